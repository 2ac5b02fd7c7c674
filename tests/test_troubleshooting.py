"""``docs/troubleshooting.md`` has every message that the package raises or warns with."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "troubleshooting.md"


def template(node):
    """A message as the document writes it, values as an ellipsis; None if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left)
    return None


def messages():
    """(file, message) of everything that is raised or warned in the package."""
    found = []
    for path in sorted([*(ROOT / "wtacrs_fx").glob("*.py"), *(ROOT / "passes").glob("*.py")]):
        nodes = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                nodes += node.exc.args[:1]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "_warn"):
                nodes += node.args[:1]
            elif isinstance(node, (ast.JoinedStr, ast.Constant)) and (template(node) or "").startswith("wtacrs: "):
                nodes.append(node)
        found += [(path.name, text) for node in nodes if len((text := template(node) or "").split()) > 1]
    return list(dict.fromkeys(found))


def pieces(message):
    """What stands between the values, without the punctuation at its ends."""
    return [p for p in (re.sub(r"\s+", " ", piece).strip(" :.,;'\"()=") for piece in message.split("…")) if len(p) > 3]


def missing(document):
    text = re.sub(r"\s+", " ", document.replace("\\|", "|"))
    return [(name, message) for name, message in messages() if not any_line(text, message)]


def any_line(text, message):
    """Whether all pieces of a message stand in the document, in order and near each other."""
    pattern = r".{0,80}?".join(map(re.escape, pieces(message)))
    return bool(pieces(message)) and re.search(pattern, text) is not None


def test_every_message_is_explained():
    assert len(messages()) > 80
    absent = missing(DOCUMENT.read_text())
    assert not absent, "add to docs/troubleshooting.md:\n" + "\n".join(f"{name}: {message}" for name, message in absent)


def test_a_message_that_is_not_there_is_found_missing():
    document = DOCUMENT.read_text()
    assert missing(document.replace("matches no linear layer of this graph", "")), "the check can fail"
    assert len(missing("")) == len(messages())
