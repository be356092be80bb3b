"""What a refused request is told: where and what is wrong, bounded, and without repeating the client's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

MOST_ERRORS = 20  # told of one request


class Strict(BaseModel):
    """A part of a request; what is not known in it is refused."""

    model_config = ConfigDict(extra="forbid")


def openai_error(code: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, code, headers=dict(headers or {}))


def bound(what: int, most: int, unit: str, *place: int | str) -> None:
    """RequestValidationError where a field is over a bound that this server sets; `place` is where it stands."""
    if what > most:
        raise RequestValidationError([{"loc": ("body", *place), "msg": f"{what} {unit}; at most {most}"}])


def differing(answers: int, temperature: float) -> None:
    """RequestValidationError where several answers are asked for at a temperature at which all are the same."""
    if answers > 1 and not temperature:
        said = f"at 0 all {answers} answers are the same one; ask for one, or give a temperature above 0"
        raise RequestValidationError([{"loc": ("body", "temperature"), "msg": said}])


async def invalid(request: Request, error: Exception) -> JSONResponse:
    """422 for a request that is not as a route takes it; in OpenAI's format where the route is one of theirs."""
    assert isinstance(error, RequestValidationError)
    said = error.errors()[:MOST_ERRORS]
    detail = [{"loc": _place(e["loc"]), "msg": e["msg"].removeprefix("Value error, ")} for e in said]
    if request.url.path.startswith("/v1/"):
        first = detail[0]
        message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return openai_error(422, message, "invalid_request_error")
    return JSONResponse({"detail": detail}, 422)


def _place(names: Iterable[int | str]) -> list[int | str]:
    """Where an error is; names are the client's own, and may be of any length and of letters that JSON cannot hold."""
    return [n if isinstance(n, int) else n.encode("ascii", "backslashreplace").decode()[:64] for n in names]
