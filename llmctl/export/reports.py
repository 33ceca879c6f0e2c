"""What is told of a gate's report: the table, the stage's line and the manifest's figures."""

from __future__ import annotations

from typing import Any


def table(report: dict[str, Any]) -> list[list[str]]:
    """The rows of the table that `-v` prints."""
    limit, original = report.get("limits", {}), report.get("original", {})
    rows = [[f"logits, {found['case']}", found["error"], limit["logits"]] for found in report.get("logits", [])]
    if read := report.get("text", {}):
        rows.append([f"logits on {read['tokens']:,} tokens of {read['name']}", read["error"], limit.get("logits")])
        rows.append(["its perplexity, a share", abs(read["change"]), limit.get("perplexity")])
        rows.append(["its divergence, nats a token", read["mean_kl"], limit.get("kl")])
    if run := report.get("greedy", {}):
        beyond = max(run["partings"], key=lambda parting: parting["gap"], default=None)
        told = f"greedy, {run['equal']:,} of {run['tokens']:,} tokens equal"
        rows.append([told, beyond["gap"] if beyond else 0.0, beyond["limit"] if beyond else None])
    if original:
        allowed = original["limits"]
        rows.append(["perplexity above the original's, a share", original["change"], allowed["increase"]])
        rows.append(["divergence from the original, nats a token", original["mean_kl"], allowed["kl"]])
        rows.append(["best tokens other than the original's", 1 - original["top1_agreement"], allowed["lost"]])
    for key, told in (("first", "the first node beyond"), ("worst", "the worst node")):
        if node := report.get("nodes", {}).get(key):
            rows.append([f"{told}: {node['name']} ({node['op']})", node["error"], node["limit"]])
    return [[name, f"{value:.1e}", "" if allowed is None else f"{allowed:.1e}"] for name, value, allowed in rows]


def summary(report: dict[str, Any]) -> str:
    """What the stage's line says of a report."""
    parts = [f"parity {report['error']:.1e}"] if "error" in report else []
    if run := report.get("greedy"):
        parts.append(f"greedy {run['equal']}/{run['tokens']} equal")
    if read := report.get("original") or report.get("text"):
        parts.append(f"perplexity {round(100 * read['change'], 2) + 0.0:+.2f} %")
    if read := report.get("original"):
        parts.append(f"{100 * read['top1_agreement']:.1f} % of best tokens")
    return " · ".join(parts)


def metrics(report: dict[str, Any]) -> dict[str, Any]:
    """What the artifact's manifest says of a report."""
    kept: dict[str, Any] = {"parity_error": report["error"]} if "error" in report else {}
    if run := report.get("greedy"):
        kept |= {"greedy_tokens": run["tokens"], "greedy_equal": run["equal"]}
    if read := report.get("text"):
        kept |= {"perplexity": read["onnx_perplexity"], "perplexity_change": read["change"]}
        kept["perplexity_text"] = read["name"]
    if original := report.get("original"):  # what quantising cost is what `change` means then
        kept |= {"perplexity": original["perplexity"], "perplexity_change": original["change"]}
        kept |= {"perplexity_text": original["name"], "original_perplexity": original["original_perplexity"]}
        kept |= {"top1_agreement": original["top1_agreement"], "mean_kl": original["mean_kl"]}
    return kept
