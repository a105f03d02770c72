"""URLs: which texts are one, and how they are shown without what is secret in them."""

import re


def is_http_url(text: str) -> bool:
    """Whether a text is the URL of an HTTP service, not a name."""
    return text.startswith(("http://", "https://"))


def hide_credentials(url: str) -> str:
    """``url`` without user and password, fit for messages and logs."""
    url = re.sub(r"(?<!/)//(?!/).*@", "//***@", url)
    return re.sub(r"((?:username|password)=)[^&]*", r"\1***", url)


def hide_credentials_in(text: str) -> str:
    """``text`` with user and password of every URL in it hidden."""
    return re.sub(r"\S+://\S+", lambda found: hide_credentials(found[0]), text)
