"""What the user got wrong: commands print it without a traceback and exit with status 2."""


class UserError(Exception):
    """Wrong input. The message says what is wrong, where, and what would be right."""


def reason(error: Exception) -> str:
    """What an error of another library says, in one line: the end of a long one, where causes stand."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"...{text[-200:]}"
