"""Proof that a form was sent from one of our own pages.

Two independent checks: the browser's own statement of where the request comes from, and a random token that
stands both in the form and in a SameSite cookie, which another site can neither read nor send along.
"""

import re
import secrets
from urllib.parse import urlsplit

from fastapi import Request, Response

COOKIE = "ratchet_form"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


class ForeignForm(Exception):
    """The form was not sent from a page of this dashboard; the message is for its reader."""


def form_token(request: Request) -> str:
    """The visitor's token, a new one if there is none."""
    given = request.cookies.get(COOKIE, "")
    return given if _TOKEN.fullmatch(given) else secrets.token_urlsafe(32)


def keep_token(request: Request, response: Response, token: str) -> None:
    response.set_cookie(
        COOKIE,
        token,
        path="/dashboard",
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def require_own_form(request: Request, token: str) -> None:
    """Raises ForeignForm."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is None and origin is None:
        raise ForeignForm("The browser did not say which page sent the form.")
    if site is not None and site != "same-origin":
        raise ForeignForm("The form was sent from another site.")
    if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
        raise ForeignForm("The form was sent from another site.")
    cookie = request.cookies.get(COOKIE, "")
    if not _TOKEN.fullmatch(cookie) or not secrets.compare_digest(cookie.encode(), token.encode()):
        raise ForeignForm("The form is too old: open it again.")
