"""The lines of a training's log that tell what its pruning history records."""

from __future__ import annotations

from collections.abc import Mapping

from ..methods.targets import MEASURED

MOST_NAMED = 3


def epoch_line(record: Mapping, dense_widths: Mapping[str, int], dense_cost: tuple[int, int]) -> str:
    """What is left after an epoch, and what is removed before the next one.

    Args:
        record: The epoch's, as in `PruningTrainer.history`.
        dense_widths: Channels per unit of the dense network.
        dense_cost: Its parameters and multiply-accumulates.
    """
    parameters, macs = dense_cost
    left, dense = sum(record["widths"].values()), sum(dense_widths.values())
    line = (
        f"{left} of {dense} channels, {record['parameters'] / 1e6:.3g} of {parameters / 1e6:.3g} M parameters "
        f"({record['parameters'] / parameters:.0%}), {record['macs'] / 1e9:.3g} of {macs / 1e9:.3g} GMACs "
        f"({record['macs'] / macs:.0%}). "
    )
    removed = {name: record["widths"][name] - len(kept) for name, kept in record["keep"].items()}
    if not removed:
        return f"{line}No cut before the next epoch" + (f": {record['held']}" if record["held"] else "")
    most = sorted(removed, key=removed.get, reverse=True)
    named = ", ".join(f"{name}: {removed[name]}" for name in most[:MOST_NAMED])
    more = f", and {len(most) - MOST_NAMED} more layers" if len(most) > MOST_NAMED else ""
    return f"{line}Removed before the next epoch: {sum(removed.values())} channels ({named}{more})"


def target_line(target: Mapping) -> str:
    """What a target came to at the end of the cutting phase.

    Args:
        target: The `target` of an epoch's record.
    """
    of_what = MEASURED.get(target["name"], "channels")
    line = f"{target['left']:.4g} of the {of_what} is left, {target['asked']:.4g} was asked for"
    named = f"{target['name']}={target['value']}"
    if target["reached"]:
        return f"Target {named} met: {line}."
    return f"WARNING: target {named} missed: {line}, and no more cuts follow: {target['why']}."
