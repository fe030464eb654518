"""Give the package the address of its repository, which is known where it is built: links of the README, and URLs.

    python .github/publish_links.py OWNER/NAME REF

Links to files of the repository become absolute, for the package index shows the README away from it; pyproject.toml
gets `[project.urls]`. Both files are changed in place: run it in a checkout that is thrown away.
"""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
# Of `[text](target)` and `![text](target)`: not another site, not a place on the same page.
_RELATIVE = re.compile(r"(!?)(\[[^\]]*\])\((?!https?://|#|mailto:)([^)\s]+)\)")


def absolute(text: str, repository: str, ref: str) -> str:
    """The README with absolute links; images are linked to what they are, files to where they are shown."""

    def link(found: re.Match) -> str:
        image, words, target = found.groups()
        site = f"https://raw.githubusercontent.com/{repository}/{ref}"
        return f"{image}{words}({site if image else f'https://github.com/{repository}/blob/{ref}'}/{target})"

    return _RELATIVE.sub(link, text)


def urls(repository: str) -> str:
    """`[project.urls]` of pyproject.toml."""
    site = f"https://github.com/{repository}"
    places = {"Homepage": "", "Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}
    return "[project.urls]\n" + "".join(f'{name} = "{site}{place}"\n' for name, place in places.items()) + "\n"


def main(repository: str, ref: str) -> None:
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), repository, ref), encoding="utf-8")
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace("[project.scripts]", urls(repository) + "[project.scripts]", 1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
