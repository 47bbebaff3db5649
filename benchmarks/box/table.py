"""Results as text."""

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.box import plans, statistics
from benchmarks.box.measure import PHASES, Cell, Results
from benchmarks.box.plans import Box

BASES = ("contiguous", "EPLB")
WAY, PLAN = 27, 11  # columns; "hierarchical:reproducible" is the longest way


def lines(results: Results) -> Iterator[str]:
    """The report, a line at a time."""
    yield from _head(results)
    for mbit, of_way in results.cells.items():
        link = results.links[mbit]
        yield ""
        yield (
            f"links of {mbit} Mbit/s: a bulk transfer between all hosts at once reaches "
            f"{link['mbit']:.0f}; {link['overhead']:.3f} bytes on the link per byte of payload"
        )
        for phase in PHASES:
            yield ""
            yield from _speed(results, of_way, phase)
        yield ""
        yield from _bytes(results, mbit)
    yield ""
    yield from _ends(results)


def _head(results: Results) -> Iterator[str]:
    m, sizes = results.machine, results.machine["sizes"]
    yield (
        f"{m['model']}: {m['layers']} MoE layers, {m['experts']} experts, top {m['top_k']}, rows "
        f"of {m['row_bytes']} bytes; {m['hosts']} hosts x {m['devices_per_host']} devices on "
        f"{m['cores']} cores; {m['rounds']} rounds"
    )
    yield (
        f"prefill: {sizes['prefill_sequences']} prompts of {sizes['prefill_tokens']} tokens; "
        f"decode: {sizes['decode_steps']} steps of {sizes['decode_sequences']} sequences after "
        f"{sizes['decode_start']} tokens; prompts that the plans have not seen"
    )
    before, after = m["load_average"]
    yield f"load average of this machine before {before:.1f}, at the end {after:.1f}"


def tokens(results: Results, phase: str) -> int:
    """Tokens of one measurement."""
    sizes = results.machine["sizes"]
    if phase == "prefill":
        return sizes["prefill_sequences"] * sizes["prefill_tokens"]
    return sizes["decode_sequences"] * sizes["decode_steps"]


def slowest(cell: Cell) -> list[float]:
    """Seconds of every round: the last host's."""
    return [max(one) for one in cell.seconds]


def busy(cell: Cell, mbit: float) -> np.ndarray:
    """Seconds that every host's link is busy in its busier direction, [hosts]; median round."""
    most = np.maximum(cell.sent, cell.received)
    return np.median(most, axis=0) * 8 / (mbit * 1e6)


def _speed(results: Results, of_way, phase: str) -> Iterator[str]:
    mbit = next(float(key) for key, value in results.cells.items() if value is of_way)
    yield (
        f"{phase:<{WAY + PLAN}}{'tokens/s':>22}{'over contiguous':>24}{'over EPLB':>24}"
        f"{'s':>9}{'link tail':>11}{'mean':>8}"
    )
    for way, of_plan in of_way.items():
        for plan, phases in of_plan.items():
            cell = phases[phase]
            rate = statistics.mean([tokens(results, phase) / s for s in slowest(cell)])
            ratios = [
                statistics.speed_up(slowest(cell), slowest(of_plan[base][phase])).text()
                for base in BASES
            ]
            link = busy(cell, mbit)
            yield (
                f"{way:<{WAY}}{plan:<{PLAN}}{rate.text(0):>22}{ratios[0]:>24}{ratios[1]:>24}"
                f"{np.median(slowest(cell)):>9.3f}{link.max():>11.3f}{link.mean():>8.3f}"
            )


def _bytes(results: Results, mbit: str) -> Iterator[str]:
    """Prefill: rows and bytes that all hosts together send to other hosts."""
    link, m = results.links[mbit], results.machine
    box, sizes = Box(m["hosts"], m["devices_per_host"]), (m["layers"], m["top_k"])
    yield (
        f"{'between hosts, prefill':<{WAY + PLAN}}{'rows predicted':>15}{'counted':>10}"
        f"{'padded/true':>13}{'MB predicted':>14}{'MB of rows':>12}{'MB kernel':>11}"
        f"{'kernel/predicted':>18}{'all padded/true':>17}"
    )
    for way, of_plan in results.cells[mbit].items():
        for plan, phases in of_plan.items():
            cell = phases["prefill"]
            counted, padded = (np.array(table).sum() for table in (cell.rows, cell.padded))
            predicted = "-" if cell.predicted is None else str(np.array(cell.predicted).sum())
            payload = padded * m["row_bytes"] / 1e6
            integers = plans.integer_bytes(way, box, tokens(results, "prefill"), *sizes) / 1e6
            expected = (payload + integers) * link["overhead"]
            kernel = np.median(np.sum(cell.sent, axis=1)) / 1e6
            all_padded = (cell.all_rows + cell.all_padding) / max(cell.all_rows, 1)
            yield (
                f"{way:<{WAY}}{plan:<{PLAN}}{predicted:>15}{counted:>10}{padded / counted:>13.3f}"
                f"{expected:>14.2f}{payload:>12.2f}{kernel:>11.2f}"
                f"{kernel / expected:>18.3f}{all_padded:>17.3f}"
            )


def _ends(results: Results) -> Iterator[str]:
    """Where the gain ends: our speed-ups by bandwidth."""
    yield "ours by bandwidth (over contiguous / over EPLB; * = the interval holds 1)"
    mbits = list(results.cells)
    yield f"{'':<{WAY + PLAN}}" + "".join(f"{mbit + ' Mbit/s':>22}" for mbit in mbits)
    for way in results.cells[mbits[0]]:
        for phase in PHASES:
            row = [_cell(results.cells[mbit][way], phase) for mbit in mbits]
            yield f"{way:<{WAY}}{phase:<{PLAN}}" + "".join(f"{text:>22}" for text in row)


def _cell(of_plan, phase: str) -> str:
    said: Sequence[str] = []
    for base in BASES:
        seconds = slowest(of_plan[plans.OURS][phase])
        found = statistics.speed_up(seconds, slowest(of_plan[base][phase]))
        said = [*said, f"{found.value:.3f}{'*' if found.low <= 1 <= found.high else ''}"]
    return " / ".join(said)
