"""What the documentation site adds to mkdocs: pages from outside docs/, and a check of every link between files.

Links are written so that they work in the repository. Here they become links between pages of the site. A link to a
file that is no page becomes plain text, and a link to a file that does not exist becomes a warning, which
`mkdocs build --strict` turns into an error.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Files outside docs/ that are pages of the site, by their names there.
OUTSIDE = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "changelog.md": "CHANGELOG.md",
    "docker.md": "docker/README.md",
    "demo_model.md": "serve_app/demo/README.md",
}
NAMES = {source: name for name, source in OUTSIDE.items()}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")

log = logging.getLogger("mkdocs.hooks.docs_site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/."""
    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of one page, which are relative to its source file, into links of the site."""
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return LINK.sub(lambda found: link_on_site(source, found[1], found[2]), markdown)


def link_on_site(source: str, text: str, target: str) -> str:
    """The Markdown of one link on the site. `source` is the file that has the link."""
    path, mark, anchor = target.partition("#")
    if not path or "://" in path:
        return f"[{text}]({target})"
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / file).exists():
        log.warning("%s links to %s, and the repository has no %s", source, target, file)
    if file in NAMES or file.startswith("docs/"):
        return f"[{text}]({NAMES.get(file) or file.removeprefix('docs/')}{mark}{anchor})"
    return text
