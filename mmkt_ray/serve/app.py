"""The HTTP application over a loaded model: /predict, /health, /openapi.json, and two plain pages."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Environment
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mmkt_ray import __version__
from mmkt_ray.errors import DataError, UserError
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.serve.limits import BodyLimit, Busy, ServerLimits, Work
from mmkt_ray.serve.requests import MAX_ROWS, RequestRow, answer, request_schema, row_from_form, rows_from_json

if TYPE_CHECKING:
    from mmkt_ray.api.model import Model

log = logging.getLogger(__name__)

TOP = 5  # classes in an answer, with their probabilities, if the request does not say otherwise
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1", "testserver")


def create_app(model: Model, name: str, limits: ServerLimits, hosts: Sequence[str] | None = LOOPBACK) -> FastAPI:
    """The application. name: what pages call the model; hosts: names that a request may ask for (None: any), so that
    a page from elsewhere can't reach a server on this machine under a name of its own."""
    app = FastAPI(title=f"mmkt: {name}", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=limits.body_bytes)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    work, kinds = Work(limits.timeout_s), model.kinds
    template = Environment(autoescape=True).from_string(
        files("mmkt_ray.serve").joinpath("page.html.j2").read_text(encoding="utf-8")
    )

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error).encode("utf-8", "backslashreplace").decode()}, 422)

    @app.exception_handler(TimeoutError)
    async def too_slow(_: Request, error: TimeoutError) -> JSONResponse:
        return JSONResponse(
            {"error": f"no answer within {limits.timeout_s:g} s: send fewer rows, or smaller files"}, 504
        )

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> JSONResponse:
        return JSONResponse({"error": "too many requests wait: try again soon"}, 503, headers={"retry-after": "1"})

    @app.post("/predict", summary="Predict the tasks of some rows", openapi_extra=request_schema(kinds))
    async def predict(request: Request, top: int = TOP) -> JSONResponse:
        """Per row: for each task the prediction and its `top` most probable classes, what the row lacks, what could
        not be read and why."""
        rows = await _rows(request, kinds)
        found = await work.run(lambda: answer(model, rows, max(0, top)))
        return JSONResponse({"model": name, "rows": found})

    @app.get("/health", summary="Whether the model is loaded, and what it reads and predicts")
    async def health() -> dict[str, Any]:
        tasks = {t: len(model.classes.get(t, [])) for t in model.tasks}
        return {"status": "ok", "model": name, "modalities": model.modalities, "tasks": tasks}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page(template, page="try", name=name, modalities=kinds, tasks=model.tasks)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return _page(template, page="docs", name=name, modalities=kinds, limits=limits, max_rows=MAX_ROWS)

    return app


async def _rows(request: Request, modalities: dict[str, ModalityKind]) -> list[RequestRow]:
    """The rows that a request asks about. Raises: DataError; HTTPException for a body of another type."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        return rows_from_json(await request.body(), modalities)
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=len(modalities), max_fields=len(modalities), max_part_size=2**20) as form:
                fields = [(k, await v.read() if isinstance(v, UploadFile) else v) for k, v in form.multi_items()]
        except HTTPException as error:
            raise DataError(f"the form cannot be read ({error.detail})") from None
        return [row_from_form(fields, modalities)]
    raise HTTPException(415, "send application/json or multipart/form-data")


def _page(template: Any, **shown: Any) -> HTMLResponse:
    """A page that loads nothing from anywhere; its own style and script are named by a nonce."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src "
        "blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return HTMLResponse(template.render(nonce=nonce, **shown), headers=headers)
