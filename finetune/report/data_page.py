"""What an audit found, for a page: the section in a run's report, and the page of `ft data check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.data.audit.audit import Audit
from finetune.report import images, tables
from finetune.report.html import document, image, section, text

GROUPS = 6  # of each kind of finding, shown as images
TOGETHER = 4  # images of one group
NAMED = 20  # files of each kind of problem; data.json has them all


def data_section(found: dict[str, Any]) -> str:
    """The section about the data; `found` is what `tables.facts` returns."""
    rows = [row for row in tables.data_rows(found) if row[0] in ("train", "held out", "scaled up")]
    parts = [f'<tr><th>{text(name)}</th><td colspan="2">{text(words)}</td></tr>' for name, words in rows]
    most = max((bucket["examples"] for bucket in found["buckets"]), default=1)
    for bucket in found["buckets"]:
        bar = f'<span class="bar" style="width:{55 * bucket["examples"] / most:.1f}%"></span>'
        crop = (
            f"cropping loses {bucket['lost']:.0%}, at worst {bucket['worst']:.0%}" if bucket["worst"] >= 0.005 else ""
        )
        size = f"{bucket['width']}×{bucket['height']}"
        parts.append(f'<tr><th>{size}</th><td>{bar}{bucket["examples"]:,}</td><td class="amount soft">{crop}</td></tr>')
    for finding in found.get("findings", []):  # runs of earlier versions have none
        parts.append(
            _named("odd", finding, [" = ".join(group) for group in finding["groups"]], sum(map(len, finding["groups"])))
        )
    for problem in found["problems"]:
        parts.append(_named("problem", problem, problem["names"][:NAMED], NAMED))
    gallery = "".join(_shown(shown) for shown in found.get("images", ()))
    gallery = f'<h3>Some of them, as the model sees them</h3>\n<div class="gallery">{gallery}</div>' if gallery else ""
    lead = "Every image and caption was looked at before training." + (
        "" if found["problems"] else " Nothing was left out."
    )
    return section(
        "data", "The images", lead, f'<div class="card"><table class="rows">{"".join(parts)}</table></div>', gallery
    )


def _named(kind: str, found: dict[str, Any], names: list[str], shown: int) -> str:
    listed = text(", ".join(names) + (", …" if found["count"] > shown else ""))
    summary = f"{found['count']} × {text(found['kind'])}: {text(found['detail'])}"
    return f'<tr><th class="{kind}">{kind}</th><td colspan="2"><details><summary>{summary}</summary><p>{listed}</p></details></td></tr>'


def _shown(shown: dict[str, Any]) -> str:
    tokens = f'<p class="soft">{text(" · ".join(shown["tokens"]))}</p>' if shown.get("tokens") else ""
    caption = f"<figcaption>{text(shown['caption'])}</figcaption>"
    return f"<figure>{image(shown['image'], shown['caption'], small=True)}{caption}{tokens}</figure>"


def write_page(audit: Audit, found: dict[str, Any], source: str, path: Path) -> None:
    """Write the page of `ft data check`: the section, and what is odd as small images."""
    kinds = []
    for finding in audit.findings:
        groups = "".join(f"<figure>{_group(audit, group[:TOGETHER])}</figure>" for group in finding.examples[:GROUPS])
        title = f"{finding.count} × {finding.kind}: {finding.detail}"
        kinds.append(f'<h3>{text(title)}</h3>\n<div class="gallery">{groups}</div>')
    odd = section("odd", "What is odd", "All of these train; look whether they should.", *kinds) if kinds else ""
    head = (
        f'<header>\n<h1>{text(tables.short(source.rstrip("/")))}</h1>\n<p class="state">{text(source)}</p>\n</header>'
    )
    path.write_text(document(source, head, data_section(found), odd), encoding="utf-8")


def _group(audit: Audit, places: tuple[int, ...]) -> str:
    shown = [audit.images[place] for place in places]
    drawn = "".join(
        image(images.of_training(shown_image, audit.background), shown_image.name, small=True) for shown_image in shown
    )
    return f"{drawn}<figcaption>{text(' = '.join(tables.short(image.name) for image in shown))}</figcaption>"
