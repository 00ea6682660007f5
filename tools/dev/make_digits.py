"""Make scenes of handwritten digits, for detection and for segmentation.

scikit-learn ships 1,797 real handwritten digits of 8x8 pixels. They are split by
image into a train and a val share before a scene is made, so no val scene holds a
digit that was seen in training. Each scene is a textured background with a few of
them, scaled up smoothly, rotated a little and overlapping here and there. The same
options give the same files.

    data/digits/
      img_dir/{train,val}/000000.png   the scenes
      ann_dir/{train,val}/000000.png   mmseg: 0 background, 1..10 the digits 0..9,
                                       255 where the ink is ambiguous
      annotations/{train,train-few,val}.json   COCO: boxes and masks of the ink
      splits/{train,train-few,val}.txt         mmseg: the names of the scenes
      digits.json                              the options and the split

`train-few` holds the first scenes of `train`: what a student's owner could label.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from sklearn.datasets import load_digits

CLASSES = tuple('0123456789')
IGNORE = 255
# Share of ink in a pixel: above SOLID it is part of the digit, below CLEAR it is not,
# in between it is ambiguous. A box encloses the pixels that are at least half ink.
SOLID, HALF, CLEAR = 0.75, 0.5, 0.25
VAL_SHARE = 0.25  # of the digit images
WIDTH, HEIGHT = 128, 96  # of a scene, in pixels
DIGITS = 2, 6  # fewest and most in a scene
SIZES = 30.0, 50.0  # about the smallest and the largest height of a digit, in pixels
MAX_ANGLE = 15.0  # rotation to either side, in degrees
MAX_OVERLAP = 0.15  # IoU of two boxes in a scene
CONTRAST = 70.0  # least difference of ink and background, of 255
NOISE = 5.0  # standard deviation of the pixel noise, of 255


def split_digits(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Split the digit images by class into disjoint `train` and `val` indices."""
    rng = np.random.default_rng(seed)
    train, val = [], []
    for label in np.unique(labels):
        index = rng.permutation(np.flatnonzero(labels == label))
        num_val = round(VAL_SHARE * len(index))
        val.extend(index[:num_val])
        train.extend(index[num_val:])
    return {'train': np.sort(train), 'val': np.sort(val)}


def make_background(rng: np.random.Generator) -> np.ndarray:
    """Return a (height, width, 3) float image of noise at several scales."""
    image = np.full((HEIGHT, WIDTH, 3), rng.uniform(30, 120, 3))
    for cell in (48, 24, 12, 6, 3):
        shape = (HEIGHT // cell + 2, WIDTH // cell + 2)
        noise = rng.normal(size=(*shape, 1)) + 0.5 * rng.normal(size=(*shape, 3))
        noise = cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        image += rng.uniform(3, 12) * noise
    return np.clip(image, 0, 255)


def draw_ink(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Place one 8x8 digit; return how much of each pixel is ink, (height, width)."""
    digit = np.pad(digit / 16.0, 2)
    # The digits were scanned into squares: the aspect restores their height.
    scale = rng.uniform(*SIZES) / 8
    aspect = rng.uniform(0.7, 1.0)
    angle = np.deg2rad(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    rotation = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix = rotation @ np.diag([scale * aspect, scale])
    margin = 3 * scale
    centre = rng.uniform(margin, (WIDTH - margin, HEIGHT - margin))
    shift = centre - matrix @ np.full(2, (len(digit) - 1) / 2)
    affine = np.column_stack([matrix, shift])
    ink = cv2.warpAffine(digit, affine, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC)
    # Steepen the blurred edge that scaling up leaves.
    return np.clip(4 * (ink - 0.45) + HALF, 0, 1)


def make_scene(
    digits: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Make one scene.

    Args:
        digits: The digit images to draw from, (n, 8, 8), values 0 to 16.
        labels: Their classes, (n,).
        rng: The source of every random choice.

    Returns:
        The image (h, w, 3) and the label map (h, w), both uint8, and for each
        digit a dict with its `index` into `digits`, its `label`, its `ink` (h, w) from
        0 to 1, and its `rle`, the COCO mask of pixels that are at least half ink.
    """
    image = make_background(rng)
    placed: list[dict] = []
    for _ in range(rng.integers(DIGITS[0], DIGITS[1] + 1)):
        for _ in range(20):  # a crowded scene may hold fewer
            index = int(rng.integers(len(digits)))
            ink = draw_ink(digits[index], rng)
            solid = ink >= HALF
            if not solid.any() or solid[[0, -1]].any() or solid[:, [0, -1]].any():
                continue  # cut off by the border
            rle = mask_utils.encode(np.asfortranarray(solid, np.uint8))
            box = mask_utils.toBbox([rle])
            others = [mask_utils.toBbox([other['rle']]) for other in placed]
            if all(mask_utils.iou(box, o, [0]) <= MAX_OVERLAP for o in others):
                break
        else:
            continue
        placed.append(dict(index=index, label=int(labels[index]), ink=ink, rle=rle))
        # Lighter than what lies under it, by at least CONTRAST.
        under = np.average(image.reshape(-1, 3), axis=0, weights=ink.ravel())
        step = rng.uniform(CONTRAST, 2 * CONTRAST)
        colour = under + step + rng.normal(0, 15, 3)
        image = image * (1 - ink[..., None]) + colour * ink[..., None]
    image = cv2.GaussianBlur(image, (3, 3), 0.6)
    image += rng.normal(0, NOISE, image.shape)

    ann = np.zeros((HEIGHT, WIDTH), np.uint8)
    covered = np.zeros((HEIGHT, WIDTH), int)
    for item in placed:
        ink = item['ink']
        ann[ink >= SOLID] = item['label'] + 1
        ann[(ink > CLEAR) & (ink < SOLID)] = IGNORE
        covered += ink > CLEAR
    ann[covered > 1] = IGNORE
    return np.clip(image, 0, 255).astype(np.uint8), ann, placed


def make_split(
    root: Path, split: str, indices: np.ndarray, num_scenes: int, args
) -> None:
    """Write the scenes of one split, its COCO json and its list of names."""
    data = load_digits()
    digits, labels = data.images[indices], data.target[indices]
    images, annotations = [], []
    for folder in ('img_dir', 'ann_dir'):
        (root / folder / split).mkdir(parents=True)
    for scene in range(num_scenes):
        # One generator per scene: a scene does not depend on how many there are.
        rng = np.random.default_rng([args.seed, ('train', 'val').index(split), scene])
        image, ann, placed = make_scene(digits, labels, rng)
        name = f'{scene:06d}.png'
        cv2.imwrite(str(root / 'img_dir' / split / name), image)
        cv2.imwrite(str(root / 'ann_dir' / split / name), ann)
        images.append(dict(id=scene, file_name=name, width=WIDTH, height=HEIGHT))
        for item in placed:
            rle = item['rle']
            annotation = dict(
                id=len(annotations) + 1,
                image_id=scene,
                category_id=item['label'] + 1,
                bbox=mask_utils.toBbox(rle).tolist(),
                area=int(mask_utils.area(rle)),
                iscrowd=0,
                segmentation={**rle, 'counts': rle['counts'].decode()},
                digit=int(indices[item['index']]),
            )
            annotations.append(annotation)
    write_lists(root, split, images, annotations)
    if split == 'train':
        few = args.train_few
        first = [a for a in annotations if a['image_id'] < few]
        write_lists(root, 'train-few', images[:few], first)


def write_lists(root: Path, name: str, images: list, annotations: list) -> None:
    """Write a COCO json and the list of scene names that mmseg reads."""
    categories = [{'id': i + 1, 'name': name} for i, name in enumerate(CLASSES)]
    coco = dict(images=images, annotations=annotations, categories=categories)
    (root / 'annotations' / f'{name}.json').write_text(json.dumps(coco))
    names = [Path(image['file_name']).stem for image in images]
    (root / 'splits' / f'{name}.txt').write_text('\n'.join(names) + '\n')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: str | int, text: str) -> None:
        text += ' (default: %(default)s)'
        parser.add_argument(name, type=type(default), default=default, help=text)

    add('--out', 'data/digits', 'folder to write')
    add('--train', 1200, 'number of train scenes')
    add('--train-few', 300, 'how many of them are also in train-few')
    add('--val', 200, 'number of val scenes')
    add('--seed', 0, 'seed of the split and of the scenes')
    args = parser.parse_args(argv)
    if args.train_few > args.train:
        parser.error(
            f'--train-few {args.train_few} is more than --train {args.train}; it is '
            'a part of the train scenes, so make it smaller or --train larger'
        )
    return args


def main(argv: list[str] | None = None) -> None:
    """Make the data, unless it exists with the same options."""
    args = parse_args(argv)
    out = Path(args.out)
    options = {key: value for key, value in vars(args).items() if key != 'out'}
    record = out / 'digits.json'
    if record.exists():
        if json.loads(record.read_text())['options'] == options:
            print(f'{out}: already made with these options')
            return
    elif out.exists() and any(out.iterdir()):
        raise SystemExit(
            f'{out} is not empty and was not made by this tool; name another with --out'
        )

    # Made beside the target and moved there whole, so a half-made one is never used.
    partial = out.with_name(out.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ('annotations', 'splits'):
        (partial / folder).mkdir(parents=True)
    split = split_digits(load_digits().target, args.seed)
    for name, num_scenes in (('train', args.train), ('val', args.val)):
        make_split(partial, name, split[name], num_scenes, args)
    digits = {name: index.tolist() for name, index in split.items()}
    made = dict(options=options, digits=digits)
    (partial / record.name).write_text(json.dumps(made))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(
        f'{out}: {args.train} train scenes ({args.train_few} of them in train-few) '
        f'and {args.val} val scenes of {WIDTH}x{HEIGHT} pixels'
    )


if __name__ == '__main__':
    main()
