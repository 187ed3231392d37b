"""The numbers that the paper printed, as data: Tables 1-6 and what is known of Fig. 4.

Percentages as printed, also where the paper contradicts itself; `known_errors` and the notes say where it does.
Results of this project are never among them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

LAMBDA = "lambda-"
"""How the names of `cmac.config.VARIANTS` start that differ in the weight of the consistency loss; the rest is the
weight. Fig. 4 is about them."""


@dataclass(frozen=True, kw_only=True)
class PaperColumn:
    """What one column of figures measures."""

    dataset: str
    """As in `Result.dataset`."""
    metric: str
    """As in `Result.metrics`."""
    heading: str
    """For a table's head."""
    decimals: int = 1
    """With which its percentages are printed."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One printed row."""

    key: str
    """Unique within its table, e.g. `no-consistency`."""
    method: str
    """As printed, without citation."""
    citation: int | None = None
    """Number in the paper's list of references."""
    ours: bool = False
    """Whether it is a variant of the paper's own method."""
    variant: str | None = None
    """What trains it here: a name of `cmac.config.VARIANTS`, `full` for a preset without one, `scratch` for no
    pretraining at all. One variant may be a row of several tables."""
    settings: tuple[str, ...] = ()
    """As printed, one per name in `PaperTable.settings`."""
    percents: tuple[float | None, ...]
    """As printed, one per column; None for a dash, a cross or nothing."""
    likely_percents: tuple[float | None, ...] | None = None
    """What was probably meant, where a row is misprinted."""
    note: str = ""
    """What one must know to compare with it."""


@dataclass(frozen=True, kw_only=True)
class PaperValue:
    """One printed figure with everything that belongs to it."""

    table: str
    key: str
    method: str
    dataset: str
    metric: str
    percent: float | None
    """As printed; None for a dash."""
    likely_percent: float | None
    """What was probably meant; the same as `percent` but for misprints."""
    note: str


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """One table (or figure) of the paper."""

    name: str
    """`1` to `6`, `fig4`."""
    title: str
    section: str
    """Of the paper, where it is discussed."""
    task: str
    """As in `Result.task`: what makes rows for it."""
    split: str
    """As in `Result.split`, for all columns but those in `column_splits`."""
    column_splits: dict[str, str] = field(default_factory=dict)
    """Dataset -> split, where it is another one."""
    settings: tuple[str, ...] = ()
    """Heads of the columns that say what a row is."""
    columns: tuple[PaperColumn, ...]
    rows: tuple[PaperRow, ...]
    protocol: str
    """In a sentence."""
    known_errors: tuple[str, ...] = ()

    def split_of(self, dataset: str) -> str:
        """The split whose results belong into the columns of a dataset."""
        return self.column_splits.get(dataset, self.split)

    def row(self, key: str) -> PaperRow:
        """The row of that key. Raises ValueError for none."""
        for row in self.rows:
            if row.key == key:
                return row
        raise ValueError(
            f"table {self.name} has no row {key!r}, expected one of {', '.join(row.key for row in self.rows)}"
        )

    def value(self, key: str, dataset: str, metric: str) -> PaperValue:
        """One figure. Raises ValueError for a row or a column that the table does not have."""
        row = self.row(key)
        for index, column in enumerate(self.columns):
            if (column.dataset, column.metric) == (dataset, metric):
                likely = row.percents if row.likely_percents is None else row.likely_percents
                return PaperValue(
                    table=self.name,
                    key=key,
                    method=row.method,
                    dataset=dataset,
                    metric=metric,
                    percent=row.percents[index],
                    likely_percent=likely[index],
                    note=row.note,
                )
        raise ValueError(f"table {self.name} has no column {metric} of {dataset}")

    def values(self) -> Iterator[PaperValue]:
        """All figures, row by row, dashes among them."""
        for row in self.rows:
            for column in self.columns:
                yield self.value(row.key, column.dataset, column.metric)


_TOP1 = (
    PaperColumn(dataset="ucf101", metric="top1", heading="UCF101"),
    PaperColumn(dataset="hmdb51", metric="top1", heading="HMDB51"),
)
_ABLATION = (
    "Pretraining on Kinetics-400 for 50 epochs at batch size 64, then fine-tuning on split 1 without color jitter "
    "(section 4.3); top-1 of videos."
)
_HMDB_OF_THE_FULL_MODEL = (
    "The full model's HMDB51 accuracy is 57.8 in Tables 1 and 3 and 57.9 in Table 2 (cosine, 2 scales)."
)

TABLE_1 = PaperTable(
    name="1",
    title="Attention consistency and contrastive loss",
    section="4.3.1",
    task="ablation",
    split="1",
    settings=("Att. Cons.", "Contr. Loss"),
    columns=_TOP1,
    rows=(
        PaperRow(
            key="scratch",
            method="Scratch",
            ours=True,
            variant="scratch",
            settings=("✗", "✗"),
            percents=(73.2, 23.7),
        ),
        PaperRow(
            key="single-modality",
            method="Single Modality",
            ours=True,
            variant="single-modality",
            settings=("✗", "✓"),
            percents=(82.5, 47.3),
            note="The paper does not say how it was trained; two views of one modality are needed for it.",
        ),
        PaperRow(
            key="no-contrastive",
            method="CMAC w/o L_cl",
            ours=True,
            variant="no-contrastive",
            settings=("✓", "✗"),
            percents=(76.4, 25.1),
        ),
        PaperRow(
            key="no-consistency",
            method="CMAC w/o L_ac",
            ours=True,
            variant="no-consistency",
            settings=("✗", "✓"),
            percents=(85.5, 56.4),
        ),
        PaperRow(
            key="full", method="CMAC", ours=True, variant="full", settings=("✓", "✓"), percents=(87.2, 57.8)
        ),
    ),
    protocol=_ABLATION,
    known_errors=(_HMDB_OF_THE_FULL_MODEL,),
)

TABLE_2 = PaperTable(
    name="2",
    title="Normalization and scales of the pyramid correlation filtering",
    section="4.3.3",
    task="ablation",
    split="1",
    settings=("norm.", "Scale"),
    columns=_TOP1,
    rows=(
        PaperRow(
            key="none-1",
            method="PCF",
            ours=True,
            variant="norm-none",
            settings=("None", "1"),
            percents=(85.8, 57.0),
        ),
        PaperRow(
            key="softmax-1",
            method="PCF",
            ours=True,
            variant="norm-softmax",
            settings=("softmax", "1"),
            percents=(86.6, 57.4),
        ),
        PaperRow(
            key="cosine-1",
            method="PCF",
            ours=True,
            variant="scales-1",
            settings=("cosine", "1"),
            percents=(87.0, 57.6),
        ),
        PaperRow(
            key="cosine-2",
            method="PCF",
            ours=True,
            variant="full",
            settings=("cosine", "2"),
            percents=(87.2, 57.9),
        ),
        PaperRow(
            key="cosine-3",
            method="PCF",
            ours=True,
            variant="scales-3",
            settings=("cosine", "3"),
            percents=(86.9, 57.8),
        ),
    ),
    protocol=_ABLATION,
    known_errors=(_HMDB_OF_THE_FULL_MODEL,),
)

TABLE_3 = PaperTable(
    name="3",
    title="Within-modal negatives and positives in the contrastive loss",
    section="4.3.4",
    task="ablation",
    split="1",
    settings=("w/i Neg", "w/i Pos", "Iter."),
    columns=_TOP1,
    rows=(
        PaperRow(
            key="neither",
            method="CMAC",
            ours=True,
            variant="no-within-negatives",
            settings=("✗", "✗", "3,509"),
            percents=(86.5, 57.0),
        ),
        PaperRow(
            key="negatives",
            method="CMAC",
            ours=True,
            variant="full",
            settings=("✓", "✗", "3,509"),
            percents=(87.2, 57.8),
        ),
        PaperRow(
            key="positives",
            method="CMAC",
            ours=True,
            variant="within-positives",
            settings=("✗", "✓", "7,018"),
            percents=(86.2, 56.4),
        ),
        PaperRow(
            key="both",
            method="CMAC",
            ours=True,
            variant="within-both",
            settings=("✓", "✓", "7,018"),
            percents=(86.7, 57.5),
        ),
    ),
    protocol=_ABLATION + " Iter.: steps per epoch.",
    known_errors=(_HMDB_OF_THE_FULL_MODEL,),
)

FIGURE_4 = PaperTable(
    name="fig4",
    title="Weight λ of the consistency loss",
    section="4.3.2",
    task="ablation",
    split="1",
    settings=("λ",),
    columns=_TOP1,
    rows=(
        PaperRow(
            key="0",
            method="CMAC",
            ours=True,
            variant="no-consistency",
            settings=("0",),
            percents=(85.5, None),
        ),
        PaperRow(
            key="1.5", method="CMAC", ours=True, variant="full", settings=("1.5",), percents=(87.2, None)
        ),
    ),
    protocol=_ABLATION + " The two points that the text names; the others are only drawn, and so is HMDB51.",
)

_T4_SETTINGS = ("Backbone", "Pretrained Dataset", "Input Size", "Batch Size", "Epoch")

TABLE_4 = PaperTable(
    name="4",
    title="Action recognition after fine-tuning",
    section="4.5",
    task="action-recognition",
    split="1-3 mean",
    settings=_T4_SETTINGS,
    columns=_TOP1,
    rows=(
        PaperRow(
            key="multisensory",
            method="Multisensory",
            citation=34,
            settings=("3D-ResNet18", "Kinetics-400", "64×224²", "64", "400"),
            percents=(82.1, None),
        ),
        PaperRow(
            key="cpd",
            method="CPD",
            citation=27,
            settings=("3D-ResNet50", "Kinetics-400", "8×224²", "128", "110"),
            percents=(88.7, 57.7),
            note="Uses the videos' texts (titles) as supervision.",
        ),
        PaperRow(
            key="avts",
            method="AVTS",
            citation=25,
            settings=("MC3-18", "Kinetics-400", "25×224²", "64", "90"),
            percents=(85.5, 56.9),
        ),
        PaperRow(
            key="avslowfast",
            method="AV Sync+RotNet",
            citation=49,
            settings=("AVSlowFast", "Kinetics-400", "64×224²", "1024", "120"),
            percents=(87.0, 54.6),
        ),
        PaperRow(
            key="speednet",
            method="SpeedNet",
            citation=5,
            settings=("S3D", "Kinetics-400", "16×224²", "-", "81.1"),
            percents=(48.8, None),
            likely_percents=(81.1, 48.8),
            note="Misprinted: shifted by a column to the left, so that 81.1 stands under Epoch; likely UCF101 81.1, "
            "HMDB51 48.8.",
        ),
        PaperRow(
            key="xdc",
            method="XDC",
            citation=1,
            settings=("R(2+1)D-18", "Kinetics-400", "32×224²", "32", "120"),
            percents=(86.8, 52.6),
        ),
        PaperRow(
            key="avid",
            method="AVID",
            citation=30,
            settings=("R(2+1)D-18", "Kinetics-400", "32×224²", "256", "400"),
            percents=(87.5, 60.8),
            note="The network that AVID calls R(2+1)D-18 is another one: full 3×7×7 stem, max-pool, no mid-planes.",
        ),
        PaperRow(
            key="gdt",
            method="GDT",
            citation=38,
            settings=("R(2+1)D-18", "Kinetics-400", "32×128²", "768", "200"),
            percents=(89.3, 60.0),
            note="GDT's own repository later reports 90.9 / 62.3 (Kinetics-400, 30×112²), above CMAC's row. Its test "
            "takes 3 crops, raw logits and the best of the last epochs.",
        ),
        PaperRow(
            key="cmac",
            method="CMAC",
            ours=True,
            variant="full",
            settings=("R(2+1)D-18", "Kinetics-400", "32×128²", "128", "200"),
            percents=(90.3, 61.1),
        ),
    ),
    protocol="Fine-tuning on each of the three official splits; 10 uniform clips per test video, mean softmax; mean "
    "top-1 of the splits (section 4.2).",
    known_errors=("SpeedNet's row is shifted by a column to the left.",),
)

TABLE_5 = PaperTable(
    name="5",
    title="Video retrieval",
    section="4.5",
    task="video-retrieval",
    split="1",
    columns=tuple(
        PaperColumn(dataset=dataset, metric=f"R@{k}", heading=f"{name} R@{k}")
        for dataset, name in (("ucf101", "UCF101"), ("hmdb51", "HMDB51"))
        for k in (1, 5, 10)
    ),
    rows=(
        PaperRow(
            key="clip-order",
            method="ClipOrder",
            citation=50,
            percents=(14.1, 30.3, 40.4, 7.6, 22.9, 34.4),
        ),
        PaperRow(
            key="speednet", method="SpeedNet", citation=5, percents=(13.0, 28.1, 37.5, None, None, None)
        ),
        PaperRow(key="vcp", method="VCP", citation=28, percents=(18.6, 33.6, 42.5, 7.6, 24.4, 36.3)),
        PaperRow(key="vsp", method="VSP", citation=8, percents=(24.6, 41.9, 51.3, 10.3, 26.6, 38.8)),
        PaperRow(key="gdt", method="GDT", citation=38, percents=(57.4, 73.4, 80.8, 25.4, 51.4, 63.9)),
        PaperRow(
            key="cmac",
            method="CMAC",
            ours=True,
            variant="full",
            percents=(58.4, 74.2, 81.3, 26.0, 52.2, 64.2),
        ),
    ),
    protocol="Frozen encoder, split 1, test videos query the training videos; 10 uniform clips per video, mean of the "
    "pooled features of the last residual block, cosine; a video of the same class among the k nearest (section 4.2).",
)

TABLE_6 = PaperTable(
    name="6",
    title="Audio classification with a linear classifier",
    section="4.5",
    task="audio-classification",
    split="folds 1-5",
    column_splits={"dcase2014": "test"},
    columns=(
        PaperColumn(dataset="esc50", metric="top1", heading="ESC50"),
        PaperColumn(dataset="dcase2013", metric="top1", heading="D2013", decimals=0),
        PaperColumn(dataset="dcase2014", metric="top1", heading="D2014", decimals=0),
    ),
    rows=(
        PaperRow(key="soundnet", method="SoundNet", citation=4, percents=(74.2, None, None)),
        PaperRow(key="scratch", method="Scratch", ours=True, variant="scratch", percents=(None, 48.0, None)),
        PaperRow(
            key="single-modality",
            method="Single-Modal",
            ours=True,
            variant="single-modality",
            percents=(None, 61.0, None),
        ),
        PaperRow(
            key="baseline",
            method="Baseline",
            ours=True,
            variant="baseline",
            percents=(None, 68.0, 89.0),
            note="The cross-modal contrastive loss of Eq. (2).",
        ),
        PaperRow(key="avts", method="AVTS", citation=25, percents=(76.7, None, None)),
        PaperRow(
            key="avts-as-avid",
            method="AVTS",
            citation=30,
            percents=(None, None, 91.0),
            note="Named AVTS but tagged [30], which is AVID; AVTS is [25].",
        ),
        PaperRow(key="avid", method="AVID", citation=30, percents=(79.1, None, None)),
        PaperRow(
            key="xdc",
            method="XDC",
            citation=1,
            percents=(78.0, None, None),
            note="The audio encoder was fine-tuned on ESC50, too.",
        ),
        PaperRow(
            key="gdt",
            method="GDT",
            citation=38,
            percents=(78.6, 73.0, 94.0),
            note="D2013 and D2014 were measured by the paper's authors with GDT's model.",
        ),
        PaperRow(key="cmac", method="CMAC", ours=True, variant="full", percents=(81.4, 76.0, 96.0)),
    ),
    protocol="Linear classifier on the frozen audio encoder; ESC50: 10 clips of 2 s, D2013 and D2014: 60 clips of 1 s "
    "per file, mean of the scores (section 4.2). Printed as two tables side by side.",
    known_errors=(
        "The second AVTS is tagged with AVID's citation.",
        "D2013 and D2014 cite one source, and there was no DCASE challenge in 2014: what is called D2014 elsewhere is "
        "training on the development files and testing on the test files of the 2013 challenge. What the paper's D2013 "
        "then is remains unknown; here it is 5-fold cross-validation.",
    ),
)

TABLES = {table.name: table for table in (TABLE_1, TABLE_2, TABLE_3, FIGURE_4, TABLE_4, TABLE_5, TABLE_6)}
"""All of them by name."""
