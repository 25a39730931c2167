"""What the files must hold that the report reads."""

from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired

from nnunet_diffusion.schemas import Count, Index, NnUNetScore, Score, Strict, TransferSource


class CaseFigures(Strict):
    """nnU-Net's figures of a label or region in a case."""

    Dice: NotRequired[NnUNetScore]


class CaseMetrics(Strict):
    """A case of nnU-Net's summary.json."""

    prediction_file: str
    metrics: dict[str, CaseFigures]


class Summary(Strict):
    """nnU-Net's summary.json, as far as the report needs it."""

    metric_per_case: list[CaseMetrics]


class EvaluatedPair(Strict):
    """The scores of an organ in a case; null: not defined."""

    dsc: Score | None
    nsd: Score | None


class UsedRules(Strict):
    """The rules of an evaluation."""

    name: str
    description: str


class EvaluationFile(Strict):
    """evaluation_RULES.json."""

    rules: UsedRules
    cases: dict[str, dict[str, EvaluatedPair]]


class Transfer(TransferSource):
    """transfer_report.json, as the report shows it."""

    timestep: Index | None
    matched: list[str]
    adapted: list[str]
    missing: list[str]
    unexpected: list[str]
    warnings: list[str]


class QualityFigures(Strict):
    """The figures of drawn images."""

    FID: float
    sFID: float
    precision: float
    recall: float
    F1: float


class Quality(Strict):
    """quality_FEATURES.json."""

    values: QualityFigures
    samples: Count
    real: Count
    k: Count
    features: str
    warnings: list[str]


class BenchmarkGroup(Strict):
    """An arm of a benchmark at one budget."""

    arm: str
    budget: str
    mean: Score
    sd: Annotated[float, Field(ge=0)] | None


class BenchmarkRun(Strict):
    """A run of a benchmark."""

    arm: str
    budget: str
    dice: Score


class Benchmark(Strict):
    """label_efficiency.json and partial_labels.json."""

    summary: Annotated[list[BenchmarkGroup], Field(min_length=1)]
    runs: list[BenchmarkRun]
    test_cases: list[str]


class RoundDecisions(Strict):
    """How many scans a round kept, left waiting and dropped."""

    keep: Index
    wait: Index
    drop: Index


class RoundCase(Strict):
    """A scan of a round: organ -> why it was not believed."""

    reasons: dict[str, list[str]]


class RoundReport(Strict):
    """report.json of a round."""

    decisions: RoundDecisions
    organs: dict[str, Index]
    cases: dict[str, RoundCase]


class ModelPlans(Strict):
    """plans.json of a model folder, as far as its settings are concerned: trainer -> setting -> value."""

    nnunet_diffusion: NotRequired[dict[str, dict[str, Any]]]
