"""The files of the chat page: HTML, style sheet and scripts, served as they are. Nothing is fetched from elsewhere."""

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Scripts and styles only from this server's files, so that nothing a model writes can run.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Page:
    """The page's files, held in memory."""

    def __init__(self) -> None:
        folder = resources.files(__package__)
        self._files = {
            file.name: file.read_bytes()
            for file in folder.iterdir()
            if file.name[file.name.rfind(".") :] in _MEDIA_TYPES
        }

    def response(self, request: Request, name: str) -> Response | None:
        """Returns a response with a file, or with status 304 if the browser has it; None: there is no such file."""
        if name not in self._files:
            return None
        content = self._files[name]
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {"ETag": tag, **_HEADERS}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_MEDIA_TYPES[name[name.rfind(".") :]], headers=headers)
