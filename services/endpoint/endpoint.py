"""One replica of the endpoint: a backend that loads, answers, and may break."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from mara_rl.common.errors import first_line
from services.endpoint.decode_plan import ApiLimits, Backend
from services.endpoint.endpoint_metrics import EndpointMetrics
from services.http.api_errors import ApiError
from services.http.api_keys import ApiKeys

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_ASK_S = 5.0


class Endpoint:
    """Holds what the HTTP API needs.

    Attributes:
        keys, limits: who may ask for how much.
        metrics: what was done.
        log_text: whether prompts and answers are written to the request log.
    """

    def __init__(
        self,
        make_backend: Callable[[], Backend],
        keys: ApiKeys,
        limits: ApiLimits,
        *,
        log_text: bool = False,
        others_loaded: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            make_backend: loads the LLM and starts its decode loop; called once, by `load`.
            others_loaded: whether other replicas can answer by now; may block.
        """
        self.keys = keys
        self.limits = limits
        self.metrics = EndpointMetrics()
        self.log_text = log_text
        self._make_backend = make_backend
        self._others_loaded = others_loaded
        self._asking = asyncio.Lock()
        self._backend: Backend | None = None
        self._failure: str | None = None

    def load(self) -> None:
        """Load the backend. Raises what `make_backend` raises."""
        try:
            backend = self._make_backend()
        except BaseException as error:
            self._failure = f"loading failed: {first_line(error)}"
            raise
        self.metrics.watch(backend.loop)
        self._backend = backend

    def load_in_background(self) -> None:
        """Load in a thread; `backend` says 503 until it is done, and `check` if it failed."""
        threading.Thread(target=self._load_and_log, name="load-backend", daemon=True).start()

    def backend(self) -> Backend:
        """What answers. Raises ApiError 503 while it loads, 500 once it is broken."""
        try:
            self.check()
        except RuntimeError as error:
            raise ApiError(500, str(error), code="broken") from error
        if self._backend is None:
            raise ApiError(503, "the LLM is loading; try again shortly", code="loading")
        return self._backend

    async def settled_backend(self) -> Backend:
        """`backend`, waited for if others have loaded: beside them a 503 would be a surprise."""
        if self._loading and await self._beside_loaded():
            while self._loading:
                await asyncio.sleep(_POLL_S)
        return self.backend()

    async def _beside_loaded(self) -> bool:
        async with self._asking:  # one request at a time: many come while it loads
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(asyncio.to_thread(self._others_loaded), _ASK_S)
            return False

    def check(self) -> None:
        """Raise RuntimeError when this replica is broken and should be replaced."""
        if self._failure is not None:
            raise RuntimeError(self._failure)
        if self._backend is not None:
            self._backend.loop.check()

    def close(self) -> None:
        """End what runs; nothing may be asked of it any more. Blocks for a step."""
        if self._backend is not None:
            self._backend.loop.stop()
            self._backend.catalog.close()
        self.metrics.close()

    @property
    def _loading(self) -> bool:
        return self._backend is None and self._failure is None

    def _load_and_log(self) -> None:
        try:
            self.load()
        except Exception:  # `check` tells of it
            logger.exception("the endpoint could not be loaded")
