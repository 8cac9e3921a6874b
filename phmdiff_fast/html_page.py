"""What every page we write begins and ends with. Pages open offline: no script, nothing fetched."""

from __future__ import annotations

import html

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""
FOOT = "<footer>Written by phmdiff-fast. Research use only, never a diagnosis.</footer>\n</body>\n</html>\n"


def escaped(value) -> str:
    """A value as text that means nothing to a browser, inside quotes too."""
    return html.escape(str(value), quote=True)
