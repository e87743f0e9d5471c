"""`python -m fmoe.docs OUT`: the pages and the API reference as an HTML site (the extra `fmoe[docs]`: mkdocs)."""

import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

PAGES = """index train lora compose notation experts backends research directories families quantised systems
    parallel sync glossary faq refused comparison""".split()
MODULES = """fmoe fmoe.layout.adapter fmoe.activations fmoe.routing fmoe.losses fmoe.surgery fmoe.dispatch fmoe.backends
    fmoe.nn fmoe.parallel fmoe.lora fmoe.dcp fmoe.sharding fmoe.families fmoe.systems fmoe.sync fmoe.codecs.formats
    fmoe.integrations fmoe.draw fmoe.testing fmoe_kernels.ops.layer fmoe_kernels.ops.products""".split()
LABELS = {"lora": "LoRA", "faq": "FAQ"}
OPTIONS = {"show_root_heading": True, "show_source": False, "members_order": "source", "show_if_no_docstring": False}


def reference() -> str:
    """A page that names every public module; mkdocstrings fills it from the docstrings."""
    root = Path(__file__).parents[1]
    there = [m for m in MODULES if m.startswith("fmoe_kernels") or _is_module(root.parent, m)]
    return "# Reference\n\n" + "\n".join(f"::: {module}\n" for module in there)


def _is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def build(out: Path) -> None:
    """Write the site into `out`. Raises ImportError with what to install."""
    try:
        commands, config = import_module("mkdocs.commands.build"), import_module("mkdocs.config")
        import_module("mkdocstrings")
    except ImportError as error:
        raise ImportError('python -m fmoe.docs needs mkdocs: pip install "fmoe[docs]"') from error
    here = Path(__file__).parent
    python = {"paths": [str(here.parents[1]), str(here.parents[1] / "kernels")], "options": OPTIONS}
    with tempfile.TemporaryDirectory() as folder:
        docs, file = Path(folder, "docs"), Path(folder, "mkdocs.yml")
        docs.mkdir()
        pages = [page for page in PAGES if (here / f"{page}.md").exists()]
        for page in pages:
            (docs / f"{page}.md").write_text((here / f"{page}.md").read_text())
        (docs / "reference.md").write_text(reference())
        (docs / "code.css").write_text(
            import_module("pygments.formatters").HtmlFormatter().get_style_defs(".codehilite")
        )
        settings = {
            "site_name": "fmoe",
            "docs_dir": str(docs),
            "site_dir": str(out.resolve()),
            "theme": {"name": "mkdocs", "highlightjs": False},  # its own loads a script from elsewhere
            "extra_css": ["code.css"],
            "use_directory_urls": False,
            "nav": [{LABELS.get(page, page.capitalize()): f"{page}.md"} for page in [*pages, "reference"]],
            "plugins": ["search", {"mkdocstrings": {"handlers": {"python": python}}}],
            "markdown_extensions": ["tables", "fenced_code", {"codehilite": {"guess_lang": False}}],
            "strict": True,
        }
        file.write_text(json.dumps(settings))  # JSON is YAML
        commands.build(config.load_config(str(file)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m fmoe.docs OUT")
    build(Path(sys.argv[1]))
