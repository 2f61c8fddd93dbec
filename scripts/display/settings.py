"""The settings of a run as text, for `--help`."""

from jaxllm.config.file import describe_keys


def key_table() -> str:
    """All settings with type, default and meaning, by what they are settings of."""
    lines: list[str] = []
    for owner, rows in describe_keys().items():
        lines.append(f"settings of a {owner} (type, default):")
        lines.extend(f"  {key} ({kind}, {default})\n      {meaning}" for key, kind, default, meaning in rows)
    return "\n".join(lines)
