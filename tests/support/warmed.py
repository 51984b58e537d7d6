"""What each run does for the first time, done once where processes are forked from.

Importing this module is the work: `processes` has its server import it, and nobody else does.
"""

from __future__ import annotations

from cure_fast.report.page import templates

for name in templates().list_templates(extensions=["html"]):
    templates().get_template(name)
