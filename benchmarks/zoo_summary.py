"""The Markdown summary of a zoo run: what each tool ran, folded and got wrong, and the networks that are hard.

The share of norms is that of the batch-norm evaluations of one run of the network that are gone afterwards, on all
networks that contain such a norm; a tool that raised or returned a wrong result folded none.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

TOOLS = {"ours": "normfuse", "fx": "torch.fx fuse", "torchao": "torchao prepare_pt2e"}

ALL_ADJACENT = "all adjacent"
HARD: Mapping[str, int | str] = {  # how many norms must be folded, after the peers' figures on these networks
    "timm/mixnet_s": 49,
    "timm/visformer_tiny": 27,
    "timm/repghostnet_050": 112,
    "timm/fastvit_t8": 70,
    "torchvision/ssdlite320_mobilenet_v3_large": ALL_ADJACENT,
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn": ALL_ADJACENT,
    "torchvision/resnet50+frozen": 53,
}

Result = Mapping[str, Any]


def markdown(results: list[dict[str, Any]], facts: Mapping[str, Any]) -> str:
    """Return the whole summary."""
    results = sorted(results, key=lambda result: result["network"])
    sections = [
        ["# Zoo: every network folded, beside two peers", "", *_machine(facts)],
        ["## Tools", "", *_tools(results)],
        ["## Groups", "", *_groups(results)],
        ["## Hard networks", "", *_hard(results)],
        ["## Norms that stay, by reason", "", *_reasons(results)],
        ["## Findings", "", *_findings(results)],
        ["## Networks", "", *_networks(results)],
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def line(result: Result) -> str:
    """Return one network as one line, for the terminal."""
    states = [f"{tool} {status(result, tool)} {folded(result, tool)}" for tool in TOOLS]
    return f"{result['network']}: {result.get('evaluations', '?')} norms; {'; '.join(states)}; {seconds(result):.0f} s"


def status(result: Result, tool: str) -> str:
    """Return ``"ok"``, ``"wrong"``, ``"raised"``, ``"capture error"``, or how the process ended before the tool did."""
    return result.get(tool, {}).get("status") or result.get("ended", "missing")


def folded(result: Result, tool: str) -> int:
    """Return the batch-norm evaluations that a tool removed, none unless the result is right."""
    return result["evaluations"] - result[tool]["left"] if status(result, tool) == "ok" else 0


def seconds(result: Result) -> float:
    """Return the time that a network took, over all parts."""
    return result.get("wall", 0) + sum(result.get(tool, {}).get("wall", 0) for tool in TOOLS)


def failures(result: Result) -> list[str]:
    """Return every promise that our result on a network breaks, one line each."""
    ours = result.get("ours", {})
    state = status(result, "ours")
    found = []
    if state != "ok":
        said = f"{ours.get('message') or result.get('message', '')} {ours.get('at', '')}".strip()
        found.append(f"{state}: {said or _judgement(result)}" if ours else state)
    if not result.get("finite", True):
        found.append("the network's own output is not finite: nothing was compared")
    if "left" not in ours:
        return found
    found += [f"{len(ours[kind])} norms {text}: {ours[kind][0]}" for kind, text in _LISTED.items() if ours[kind]]
    if not ours["original_unchanged"]:
        found.append("the user's model was changed")
    if not ours["copy_works"]:
        found.append("a deep copy of the folded model computes something else")
    found += [f"adjacent norm stays: {name}: {why}" for name, why in list(ours["adjacent_left"].items())[:3]]
    if ours["folded"] > folded(result, "ours") and state == "ok":
        found.append(
            f"the report says {ours['folded']} norms are folded, {folded(result, 'ours')} evaluations are gone"
        )
    best = max(folded(result, tool) for tool in ("fx", "torchao"))
    if folded(result, "ours") < best:
        found.append(f"a peer removes {best} evaluations, normfuse {folded(result, 'ours')}")
    return found


_LISTED = {"missing": "missing in the report", "twice": "twice in the report", "unknown": "in the report only"}


def _machine(facts: Mapping[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return [
        f"{facts['date']}, {facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB, {facts['system']},",
        f"Python {facts['python']}, {packages}. One thread per network, float64, calibrated and randomised norms.",
        "A result is right within 1e-9 of its largest value, or within ten times the network's own float64 noise",
        "(every stored number moved by one unit in the last place) where that is larger, on two inputs.",
    ]


def _tools(results: list[dict[str, Any]]) -> list[str]:
    known = [result for result in results if "evaluations" in result]
    total = sum(result["evaluations"] for result in known)
    with_norms = [result for result in known if result["evaluations"]]
    rows = []
    for tool, name in TOOLS.items():
        states = collections.Counter(status(result, tool) for result in results)
        done = sum(folded(result, tool) for result in known)
        complete = sum(folded(result, tool) == result["evaluations"] for result in with_norms)
        others = ", ".join(f"{n} {state}" for state, n in states.most_common() if state not in ("ok", "wrong")) or "–"
        right = f"{states['ok']} of {len(results)} ({_share(states['ok'], len(results))})"
        shares = [f"{done} of {total} ({_share(done, total)})", f"{complete} of {len(with_norms)}"]
        rows.append([name, right, str(states["wrong"]), others, *shares])
    return _table(["tool", "right", "wrong", "not run", "norms folded", "networks without a norm left"], rows)


def _groups(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for group in sorted({result.get("group", "not built") for result in results}):
        members = [result for result in results if result.get("group", "not built") == group]
        total = sum(result.get("evaluations", 0) for result in members)
        right = [str(sum(status(result, tool) == "ok" for result in members)) for tool in TOOLS]
        shares = [_share(sum(folded(result, tool) for result in members), total) for tool in TOOLS]
        rows.append([group, str(len(members)), str(total), *(f"{r} / {s}" for r, s in zip(right, shares, strict=True))])
    return _table(["group", "networks", "norms", *(f"{name}: right / folded" for name in TOOLS.values())], rows)


def _hard(results: list[dict[str, Any]]) -> list[str]:
    by_name = {result["network"]: result for result in results}
    rows = []
    for name, needed in HARD.items():
        result = by_name.get(name, {"network": name})
        counts = [f"{folded(result, tool)} ({status(result, tool)})" for tool in TOOLS]
        least = result.get("adjacent", "?") if needed == ALL_ADJACENT else needed
        met = isinstance(least, int) and folded(result, "ours") >= least and not result["ours"]["adjacent_left"]
        rows.append([name, str(result.get("evaluations", "?")), str(least), *counts, "yes" if met else "**no**"])
    return _table(["network", "norms", "required", *TOOLS.values(), "met"], rows)


def _reasons(results: list[dict[str, Any]]) -> list[str]:
    counts: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    for result in results:
        for reason, number in result.get("ours", {}).get("not_folded", {}).items():
            counts[reason] += number
            examples.setdefault(reason, result["network"])
    return _table(["reason", "norms", "for example in"], [[r, str(n), examples[r]] for r, n in counts.most_common()])


def _findings(results: list[dict[str, Any]]) -> list[str]:
    found = [f"- {result['network']}: {text}" for result in results for text in failures(result)]
    return found or ["Nothing: every promise held on every network."]


def _networks(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        ours = result.get("ours", {})
        cells = [f"{folded(result, tool)} {_mark(status(result, tool))}".strip() for tool in TOOLS]
        noise = f"{result['noise']:.0e}" if "noise" in result else "–"
        taken = f"{ours['seconds']:.2f}" if "seconds" in ours else "–"
        described = [result["network"], result.get("input", "–"), str(result.get("evaluations", "–"))]
        rows.append([*described, *cells, _error(ours), noise, taken])
    return _table(["network", "input", "norms", *TOOLS.values(), "error", "noise", "seconds"], rows)


def _error(result_of_tool: Result) -> str:
    if "error" not in result_of_tool:
        return "–"
    return f"{max(result_of_tool['error'], result_of_tool['error_second']):.0e}"


def _judgement(result: Result) -> str:
    return f"error {_error(result.get('ours', {}))}, limit {result.get('limit', 0):.0e}"


def _mark(state: str) -> str:
    return "" if state == "ok" else f"({state})"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
