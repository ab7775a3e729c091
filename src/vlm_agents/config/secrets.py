"""Keys and passwords belong into environment variables: settings are written down."""

import re

from vlm_agents.errors import ConfigError

ADDRESS = "http(s)://<host>[:<port>]/<path>, without user, key or query"


def refuse_secrets(setting: str, value: str) -> None:
    """ConfigError, which doesn't repeat the value, where a server's address, or a setting beside it, may hold a key.

    For the command line too: Hydra notes the overrides of a sweep before anybody else sees them.
    """
    part, of_server, name = setting.partition(".remote.")
    key_goes = f"a key belongs into the environment variable that {part}.remote.key_env names"
    if of_server and name == "url" and re.search(r"[@?#]", value):
        raise ConfigError(f"{setting} must be {ADDRESS}: {key_goes}")
    if of_server and name == "key_env" and re.search(r"[^A-Z0-9_,]", value):
        raise ConfigError(f"{setting} must be a variable's name, of A-Z, 0-9 and _: {key_goes}")
    if setting == "tracking.uri" and not value.startswith(("sqlite:", "file:")) and re.search(r"[@?#]", value):
        raise ConfigError(
            f"{setting} must be written without user, password and query, as it is kept in config.yaml: put an address "
            "with them into the environment variable MLFLOW_TRACKING_URI, and leave tracking.uri out"
        )
    secret = r"(?i)api_?key|authorization|password|secret"
    if of_server and name.startswith("request") and re.search(secret, f"{setting} {value}"):
        raise ConfigError(f"{part}.remote.request holds what looks like a key: {key_goes}")
