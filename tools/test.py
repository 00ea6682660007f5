"""Test a checkpoint of a distilled student; the teacher is not needed."""

from __future__ import annotations

import argparse

from mmengine.runner import Runner
from train import load_config, mistakes_in_words, parse


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help='path of the config file')
    add('checkpoint', help='path of the checkpoint')
    add('--show', action='store_true', help='show the predictions')
    add('--show-dir', help='draw the predictions into this folder')
    add('--tta', action='store_true', help="use the config's test-time augmentation")
    return parse(parser)


def test(args: argparse.Namespace) -> None:
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        hook = cfg.get('default_hooks', {}).get('visualization')
        if hook is None:
            raise SystemExit(
                '--show needs `default_hooks.visualization` in the config.'
            )
        hook.update(draw=True, show=args.show)
        if args.show_dir:
            cfg.visualizer.save_dir = args.show_dir
    if args.tta:
        if not {'tta_model', 'tta_pipeline'} <= set(cfg):
            raise SystemExit(
                '--tta needs `tta_model` and `tta_pipeline` in the config.'
            )
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    Runner.from_cfg(cfg).test()


def main() -> None:
    args = parse_args()
    with mistakes_in_words(args.traceback):
        test(args)


if __name__ == '__main__':
    main()
