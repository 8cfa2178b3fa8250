"""The published table of arXiv 2403.15447 (LLaMA-2-13b-chat), as data for the aggregator. Nothing was measured here.

Source: `static/csv/num_sheet.csv` of decoding-comp-trust.github.io. Changes against the dense model, in points of 100.
"""

from .report import TrustReport


DIMENSIONS = ("toxicity", "stereotype", "adversarial", "ood", "demonstrations", "privacy", "ethics", "fairness")
DENSE = dict(zip(DIMENSIONS, (80.9, 97.7, 37.4, 58.8, 66.4, 95.7, 62.3, 82.2), strict=True))
DENSE_MMLU = 53.6
# method -> runs averaged, change of MMLU, changes of the eight
CHANGES: dict[str, tuple[int, float, tuple[float, ...]]] = {
    "AWQ 8": (1, 0.0, (0.2, 0, 0, -0.4, -0.1, 0.6, -0.8, -0.2)),
    "GPTQ 8": (1, 0.0, (0.2, 0, -0.3, 0.3, 0.8, -0.1, -0.5, 2.6)),
    "AWQ 4": (1, -0.2, (0.1, 0.3, 2.1, -0.6, -5.0, -0.1, 6.9, -1.4)),
    "GPTQ 4": (3, -1.5, (-3.7, -3.3, -3.3, -4.7, 0.0, -2.4, 13.8, 5.8)),
    "AWQ 3": (3, -2.1, (-2.8, -5.2, 0.6, -0.2, -8.4, -2.4, -3.0, -8.2)),
    "GPTQ 3": (3, -8.1, (-48.8, -2.7, 0.2, -26.4, -19.0, -7.4, -10.4, 0.9)),
    "SparseGPT 2:4": (3, -13.3, (-10.2, -10.6, 3.1, -8.3, -16.7, -7.2, -14.8, 1.4)),
    "Wanda 2:4": (1, -17.9, (-31.7, -5.0, 2.4, -14.7, -16.3, -14.7, -31.8, 6.2)),
    "magnitude 2:4": (1, -19.2, (-31.6, -22.4, 9.0, -7.9, -14.3, -6.3, -40.2, -2.6)),
}


def report() -> TrustReport:
    """One row a method: mean change, worst dimension, the eight changes."""
    from .compression import aggregate

    rows = []
    for name, (n, mmlu, values) in CHANGES.items():
        changes = dict(zip(DIMENSIONS, map(float, values), strict=True))
        mean, worst = aggregate(changes)
        rows.append({"method": name, "runs": n, "mmlu": mmlu, "mean": mean, "worst": worst, **changes})
    note = (
        f"Published figures, aggregated and not measured here; dense: MMLU {DENSE_MMLU}, mean of eight "
        f"{sum(DENSE.values()) / 8:.3f}. The mean hides what cancels: read the worst dimension."
    )
    return TrustReport(
        "LLaMA-2-13b-chat", "DecodingTrust, as published in arXiv 2403.15447", rows=rows, meta={"notes": [note]}
    )
