"""The job of input statistics: every text goes through the model once."""

from __future__ import annotations

from collections.abc import Sequence

from merging.progress import Note
from merging.statistics.calibration import Calibration, Example
from merging.statistics.folder import StatsError
from merging.statistics.inputs import InputSums, Layer
from merging.statistics.job import Found, Job, text_tokens
from merging.statistics.network import Network
from merging.statistics.tokens import Tokens

_TOKENS = 4096  # of a micro-batch at most


def input_job(
    kind: str, network: Network, calibration: Calibration, seed: int, batch_size: int | None, note: Note
) -> Job:
    tokens = all_tokens(network, calibration.examples, seed)
    layers = InputSums(network, kind).layers
    if not layers:
        raise StatsError(
            "has no linear layer, so it has no input statistics", where=str(network.module.__class__.__name__)
        )

    def finish(sums: InputSums) -> Found:
        means = {name: own.cpu().numpy() for name, own in sums.means().items()}
        if unused := [name for name in sums.rows if name not in means]:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            note(f"no text has reached '{unused[0]}'{more}: no statistics of it")
        return Found(means, {name: sums.rows[name] for name in means}, {name: sums.axes[name] for name in means})

    return Job(
        what=kind,
        lengths=[len(each) for each in tokens],
        rows=[1] * len(tokens),
        tokens=_TOKENS,
        batch_size=batch_size,
        parameters=sum({each.weight: _size(each, kind) for each in layers}.values()),
        open=lambda state: InputSums(network, kind),
        batch=lambda items: network.features([tokens[place] for place in items]),
        finish=finish,
    )


def _size(layer: Layer, kind: str) -> int:
    weight = layer.module.weight
    if layer.kind == "conv":
        return int(weight[0].numel() * (len(weight) if layer.module.groups > 1 else 1))
    return int(weight.shape[layer.axis] ** (2 if kind == "gram" else 1))


def all_tokens(network: Network, examples: Sequence[Example], seed: int) -> list[Tokens]:
    """Every text that the model reads: of an embedding model queries and candidates, of others a text an example."""
    if network.head != "embedding":
        return text_tokens(network, examples, seed)
    paired = [each for each in examples if each.candidates]
    single = [each for each in examples if not each.candidates]
    found = network.read([each.query for each in single], None, [each.image for each in single])
    found += network.read([each.query for each in paired], "query", [each.image for each in paired])
    found += network.read([text for each in paired for text in each.candidates], "document")
    return found
