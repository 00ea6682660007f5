"""Forward and backward of a batch of two with random weights: the second image without
labels, against the same step with both labelled. The heads of a two-stage detector run
once for each image.
"""

from __future__ import annotations

from copy import deepcopy

from benchmarks.measure import interleaved, table
from benchmarks.step import PAIRS, models_of

FAMILIES = ('DeepLab', 'Retina', 'Faster')
NAMES = [x for x, pair in PAIRS.items() if pair.hook and x.startswith(FAMILIES)]


def steps(seconds: float) -> str:
    """The table of steps with half the batch unlabelled."""
    rows = []
    for name in NAMES:
        models = models_of(name)
        model, inputs = models.distilled, models.data['inputs']
        samples = {'both': models.data['data_samples']}
        samples['one'] = deepcopy(samples['both'])
        samples['one'][1].set_metainfo(dict(unlabelled=True))

        def train(which: str, model=model, inputs=inputs, samples=samples) -> None:
            model.parse_losses(model.loss(inputs, samples[which]))[0].backward()
            model.zero_grad()

        time = interleaved({k: lambda k=k: train(k) for k in samples}, seconds)
        ratio = time['one'] / time['both']
        times = [f'{x:.2f}' for x in time.values()]
        rows.append([name, *times, f'{ratio:.2f}'])
        print(' | '.join(rows[-1]), flush=True)
    head = ['pair', 'both labelled, s', 'one unlabelled, s', 'one / both']
    return table(head, rows) + '\n'
