"""Check quickly whether a W&B server answers, without W&B's own client, which waits long and may prompt."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit


def answers(url: str, *, timeout: float, proxies: dict[str, str] | None = None) -> bool:
    """Return whether a server at `url` answers an HTTP request in time.

    An open port is not enough: firewalls and broken servers may accept connections without an answer.

    Args:
        url: the server's base URL.
        timeout: seconds for the whole check. Name servers that do not answer could take half a minute,
            independent of the connection's time-out.
        proxies: proxies by scheme, in addition to those of the environment; loopback addresses are used without one.
    """
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(_answers(url, timeout, proxies or {})), daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(found and found[0])


def _answers(url: str, timeout: float, proxies: dict[str, str]) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1":
        chosen: dict[str, str] = {}
    else:
        chosen = {**urllib.request.getproxies(), **proxies}
        if urllib.request.proxy_bypass(host):
            chosen = {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(chosen))
    try:
        opener.open(f"{url.rstrip('/')}/healthz", timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # A server answers; W&B's client has its own settings for certificates.
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    except (OSError, ValueError):
        return False
    return True
