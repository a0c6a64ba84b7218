"""A report as one HTML page: no script, nothing fetched, pictures inside."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ctxkern.experiments.core.names import printable
from ctxkern.experiments.multifile.analysis import tables
from ctxkern.experiments.multifile.analysis.analyse import PERMUTATIONS, Analysis
from ctxkern.experiments.multifile.analysis.summary import figure, sentences
from ctxkern.experiments.multifile.analysis.tables import Table

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2430; background: #fff;
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; border-bottom: 1px solid #e4e7ee; padding-bottom: .25rem; }
p, li { max-width: 46rem; }
.note { color: #5b6272; font-size: .9rem; }
.summary { background: #f5f7fb; border-radius: .5rem; padding: .8rem 1rem .8rem 2rem; margin: 1rem 0; }
.summary li { margin: .35rem 0; max-width: none; }
img { display: block; width: 100%; min-width: 38rem; height: auto; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #e4e7ee; white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; white-space: normal; }
th:first-child, td:first-child, .text { text-align: left; }
tr:last-child td { border-bottom: 0; }
pre { font-size: .78rem; white-space: pre-wrap; background: #f5f7fb; border-radius: .5rem; padding: .8rem; }
@media print { body { font-size: 10pt; max-width: none; padding: 0; } h2 { break-after: avoid; }
  img, tr { break-inside: avoid; }
  .wide { overflow: visible; } img { min-width: 0; } table { font-size: 7pt; }
  th, td { padding: .1rem .25rem; white-space: normal; } }
"""


def _paragraph(text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f"<p{style}>{_kept(text)}</p>"


def _kept(text: str) -> str:
    """Escaped, with numbers and their signs on one line."""
    return (
        html.escape(text).replace(" %", "\u00a0%").replace(" = ", "\u00a0=\u00a0").replace(" &lt; ", "\u00a0&lt;\u00a0")
    )


def _list(lines: Sequence[str], kind: str = "") -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{_kept(line)}</li>" for line in lines) + "</ul>"


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<div class="wide"><img src="data:image/png;base64,{data}" alt="{html.escape(text)}"></div>'


def _cell(value: tables.Cell, tag: str = "td") -> str:
    kind = ' class="text"' if isinstance(value, str) else ""
    text = figure(value) if isinstance(value, float) else str(value)
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def _table(table: Table) -> str:
    worded = [all(isinstance(row[i], str) for row in table.rows) for i in range(len(table.heads))]
    heads = "".join(
        f"<th{' class=text' if text else ''}>{_kept(head)}</th>" for head, text in zip(table.heads, worded, strict=True)
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _document(title: str, subtitle: str, body: Sequence[str]) -> str:
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{_paragraph(subtitle, 'note')}\n" + "\n".join(body) + "\n</body></html>\n"
    )
    # paths of other bytes than UTF-8
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def run_page(a: Analysis, pictures: Mapping[str, Path], made: Mapping[str, object]) -> str:
    """The page of one run: its summary, then each part with its picture, table and tests.

    Args:
        a: the numbers.
        pictures: of `draw_all`.
        made: how and with what the report was made, for the last part.
    """

    def picture(name: str, text: str) -> list[str]:
        return [_image(pictures[name], text)] if name in pictures else []

    body = [_list(sentences(a), "summary"), *(_paragraph(f"Left out: {k}: {v}.", "note") for k, v in a.absent.items())]
    body += ["<h2>Movement</h2>", _paragraph(_MOVEMENT), *picture("movement", "movement of contexts and weights")]
    body += ["<h2>Which files are near each other</h2>", _paragraph(_MAPS)]
    body += [*picture("maps", "cosines by pair of files"), *picture("places", "files on two principal axes")]
    body += ["<h2>Families</h2>", _paragraph(f"Families: {a.families.describe()}.")]
    if a.purities:
        body += [_paragraph(_PURITY), *picture("purity", "purity and its nulls"), _table(tables.purity(a))]
    if len(a.names) <= 100:
        body.append(_table(tables.files(a)))
    if a.attention:
        body += ["<h2>Attention on the same input</h2>", _paragraph(_attention_text(a))]
        body += [*picture("attention", "divergence of attention by pair of contexts"), _table(tables.attention(a))]
    if a.swaps:
        body += ["<h2>Other contexts in place of a file's own</h2>", _paragraph(_LOSSES)]
        body += [*picture("losses", "rise of the loss by kind of context"), _table(tables.swaps(a))]
        answers = tables.exact(a)
        if answers:
            text = "Exact match: the share of whole answers in which the likeliest token is right at every position."
            body += [_paragraph(text), _table(answers)]
    if a.projections:
        body += ["<h2>Rank of the bilinear tensors</h2>", _paragraph(_RANKS), *picture("ranks", "effective ranks")]
        body.append(_table(tables.projections(a)))
    body += _provenance(a, made)
    subtitle = f"{len(a.names)} files, step {a.run.step}, K = {a.contexts.shape[1]}; {printable(a.run.path)}"
    return _document(f"What contexts do in {a.run.path.resolve().name}", subtitle, body)


def _provenance(a: Analysis, made: Mapping[str, object]) -> list[str]:
    stored = {name: value for name, value in a.stored.items() if name != "files"}
    body = ["<h2>How this was made</h2>", _paragraph("The report:")]
    body += [f"<pre>{html.escape(json.dumps(dict(made), indent=1, ensure_ascii=False))}</pre>", _paragraph("The run:")]
    return [*body, f"<pre>{html.escape(json.dumps(stored, indent=1, ensure_ascii=False))}</pre>"]


def runs_page(analyses: Sequence[Analysis], picture: Path, made: Mapping[str, object]) -> str:
    """The page of several runs that differ in the seed: figures over runs, and each run's summary."""
    body = [_paragraph(_RUNS.format(n=len(analyses), least=figure(2.0 ** -len(analyses))))]
    body += [_image(picture, "key figures by run"), _table(tables.over_runs(analyses))]
    for a in analyses:
        body += [f"<h2>{html.escape(printable(a.run.path))}</h2>", _list(sentences(a), "summary")]
    body += _provenance(analyses[0], made)
    names = ", ".join(a.run.path.resolve().name for a in analyses)
    return _document(f"What contexts do in {len(analyses)} runs", names, body)


_MOVEMENT = (
    "How far each context has turned from where its training began, and how large what it adds to the weights, "
    "ΔW = Σ T[:, :, k] c[k], is next to the shared weights: root mean square over files, by layer and projection. "
    "About 0.25 in runs that went well."
)
_MAPS = (
    "Cosines between the contexts of two files, and between what they add to the weights (all layers, q, k and v "
    "together), files ordered by family. Below, the same on the two directions in which files differ most (PCA)."
)
_PURITY = (
    "Purity is the share of a file's k nearest files (by cosine) that are of its family, mean over the files that have "
    "relatives; the others have no purity of their own, and are neighbours that these can wrongly have. A p value is "
    f"the share of null values that reach what was seen, itself counted: {PERMUTATIONS:,} random orders of the family "
    "labels, and random contexts in place of the learned ones."
)
_LOSSES = (
    "Validation loss of each file (nats per label) in its own context, and how it changes in another's: of a random "
    "file, of the nearest file, the mean of all, and zero. Intervals are 95 %, by a bootstrap over the file's windows "
    "or, for the mean, over files."
)
_RANKS = (
    "The bilinear tensor [D, E, K] of each projection as a matrix [K, D·E]: along how many directions of the context "
    "does it change the weights? The effective rank is the exponential of the entropy of the shares of the squared "
    "singular values, the participation ratio 1 / Σ share². The dashed line is K."
)
_RUNS = (
    "{n} runs of one setting that differ in the seed. Figures that would be 0 if contexts did nothing have a p value: "
    "the share of sign patterns over runs whose mean is at least as large, which cannot be below {least} here."
)


def _attention_text(a: Analysis) -> str:
    d = a.attention
    most = f" Of {len(a.names)} files {len(a.attended)} are compared." if len(a.attended) < len(a.names) else ""
    windows = d.windows if d else 0
    return (
        f"The Jensen-Shannon divergence between attention maps on the same input ({windows} validation windows) in the "
        "contexts of two files: 0 where they are equal, ln 2 = 0.693 at most; mean over layers, heads and queries. A "
        "large one proves nothing, as random contexts have it too. So it is compared: with contexts replaced by random "
        "vectors of the same norm (p by sign flips over files); on a file's own input, with contexts dealt out to "
        "files at random (does its own stand apart?); and between and within families, with permuted labels." + most
    )
