"""Pages of the site that are made while it is built: the command's own help, and the changelog of the repository."""
import os
from pathlib import Path

from pipeengine.cli.main import _parser

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page, **_) -> str:
    """Called by mkdocs with the text of each page."""
    made = {"reference/command.md": command_page, "changelog.md": changelog_page}.get(page.file.src_uri)
    return markdown if made is None else made()


def command_page() -> str:
    """Every command's help, at a width of 100 columns."""
    os.environ["COLUMNS"] = "100"
    parser = _parser()
    (commands,) = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return "\n".join(["# Command line\n", f"```\n{parser.format_help()}```\n",
                      *(f"## pipeengine {name}\n\n```\n{own.format_help()}```\n" for name, own in commands.items())])


def changelog_page() -> str:
    """CHANGELOG.md, with its links as they are from within the site."""
    return (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
