"""A model on a server: one that plays, rates or judges, or the policy itself while it is trained."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from vlm_agents.config.fields import Part, setting
from vlm_agents.config.secrets import ADDRESS, refuse_secrets
from vlm_agents.errors import ConfigError

AUTO_URL = "auto"
UNNAMED = "default"


@dataclass
class EndpointConfig(Part, place="rollout.remote"):
    """Where a server is, and how it is asked. The key, where one is needed, is read from the environment variable
    `key_env`."""

    needs: ClassVar[tuple[str, ...]] = ()  # settings with which stage=serve has to start it

    url: str = setting(
        "http://127.0.0.1:8000/v1",
        "address of an OpenAI-compatible server, up to and with /v1; auto: of the one that stage=serve started",
        may_change=True,
    )
    server: str = setting("", "url=auto: name, or run directory, of that stage=serve", may_change=True)
    wait_s: float = setting(
        600.0, "url=auto: seconds that a run waits for that server to answer, before it begins", low=0, may_change=True
    )
    key_env: str = setting(
        "OPENAI_API_KEY", "environment variable that holds the key, where the server needs one", may_change=True
    )
    concurrency: int = setting(8, "requests under way at once", low=1, may_change=True)
    timeout_s: float = setting(60.0, "seconds for one try", positive=True, may_change=True)
    retries: int = setting(
        4,
        "of a request that was refused for now (429, 5xx), or got no answer; waits double up to 30 s",
        low=0,
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parts = urlsplit(self.url)
            plain = self.auto or (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
        except ValueError:
            plain = False
        if not plain:
            raise ConfigError(f"{self.place}.url must be {ADDRESS}, or auto")
        refuse_secrets(f"{self.place}.url", self.url)
        refuse_secrets(f"{self.place}.key_env", self.key_env)

    @property
    def auto(self) -> bool:
        """Is its address that of a stage=serve, which hands it over by a file?"""
        return self.url == AUTO_URL


@dataclass
class RemoteConfig(EndpointConfig, place="stage.remote"):
    """An OpenAI-compatible server of a chat model."""

    model: str = setting(UNNAMED, f"the server's name of the model; {UNNAMED} with url=auto: what it serves")
    request: Any = setting(
        None,
        "{field: value} to add to each request, or to replace there; a null leaves the field out",
    )
    cache: str = setting(
        "outputs/.answers",
        "folder of all answers so far, shared by all runs: what it holds isn't asked again",
        may_change=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_request()

    @property
    def unnamed(self) -> bool:
        """Is its server to say the model's name?"""
        return self.auto and self.model == UNNAMED

    def _check_request(self) -> None:
        if self.request is None:
            return
        place = f"{self.place}.request"
        if not (isinstance(self.request, dict) and all(isinstance(name, str) for name in self.request)):
            raise ConfigError(f"{place} must be fields: '{place}={{seed: null, top_p: 0.9}}'")
        for name in {"model", "messages", "n", "stream"} & set(self.request):
            fix = "what is asked and how it is answered stays as it is"
            fix = f"set {self.place}.model" if name == "model" else fix
            raise ConfigError(f"{place} can't have a field {name}: {fix}")
        try:
            text = json.dumps(self.request, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{place} can't be sent as JSON: {error}") from error
        refuse_secrets(place, text)
