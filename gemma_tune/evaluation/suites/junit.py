"""Writes the checks of a suite as JUnit XML, which GitHub, GitLab and Jenkins show.

There is no official schema. The elements and attributes are those that Jenkins's and GitLab's readers share:
`testsuites` and `testsuite` with counts, `testcase` with `classname` and `name`, and in it one `failure` or `skipped`
with a message.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.errors import ConfigError
from gemma_tune.evaluation.suites.check_suite import Check, FailedRow
from gemma_tune.runtime.atomic_files import disk_errors_as, write_atomically

_MAX_ROWS = 20  # Of a failed check. A CI page with hundreds is unreadable.
# Everything that XML 1.0 has no way to write: https://www.w3.org/TR/xml/#charsets
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(path: Path, suite_name: str, checks: Sequence[Check]) -> None:
    """Writes the checks of a suite as JUnit XML: a test suite for each part, a test case for each check.

    Args:
        path: File to write. Its folder is made if it is missing.
        suite_name: Name of the suite.
        checks: Checks, from `check_suite`.

    Raises:
        ConfigError: The file can't be written.
    """
    root = ET.Element("testsuites", {"name": _xml_text(suite_name), **_counts(checks)})
    for part in dict.fromkeys(check.part for check in checks):
        of_part = [check for check in checks if check.part == part]
        element = ET.SubElement(root, "testsuite", {"name": _xml_text(part), **_counts(of_part)})
        for check in of_part:
            _add_check(element, f"{suite_name}.{part}", check)
    ET.indent(root)
    document = ET.ElementTree(root)
    with disk_errors_as(ConfigError, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda partial: document.write(partial, encoding="utf-8", xml_declaration=True))


def _counts(checks: Sequence[Check]) -> dict[str, str]:
    return {
        "tests": str(len(checks)),
        "failures": str(sum(check.passed is False for check in checks)),
        "errors": "0",
        "skipped": str(sum(check.passed is None for check in checks)),
    }


def _add_check(suite: ET.Element, class_name: str, check: Check) -> None:
    case = ET.SubElement(suite, "testcase", classname=_xml_text(class_name), name=_xml_text(check.wanted))
    if check.passed is None:
        ET.SubElement(case, "skipped", message=_xml_text(check.message))
    elif not check.passed:
        failure = ET.SubElement(case, "failure", type="requirement", message=_xml_text(check.message))
        failure.text = _xml_text("\n\n".join([check.message, *_describe_rows(check.failed_rows)]))


def _describe_rows(rows: Sequence[FailedRow]) -> list[str]:
    described = [
        f"{row.case.origin}: {row.reason}\nquestion: {row.case.question}\nanswer:   {row.answer}"
        + (f"\nwanted:   {row.case.reference}" if row.case.reference else "")
        for row in rows[:_MAX_ROWS]
    ]
    return described if len(rows) <= _MAX_ROWS else [*described, f"… and {len(rows) - _MAX_ROWS} more."]


def _xml_text(text: str) -> str:
    """Returns a text whose control characters and lone surrogates are escaped as in Python, such as `\\x00`."""
    return _NOT_XML.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
