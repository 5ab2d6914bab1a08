"""Whether a W&B server is there, found out quickly and without W&B's own client, which waits long and may ask."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit


def answers(url: str, *, timeout: float, proxies: dict[str, str] | None = None) -> bool:
    """Whether anything at `url` answers an HTTP request in time.

    An open port is not enough: firewalls and dead servers accept connections and stay silent.

    Args:
        url: the server's base URL.
        timeout: seconds for all of it. Silent name servers would take up to half a minute, whatever the time-out of the
            connection.
        proxies: by scheme, beside those that the environment names; loopback addresses go without.
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
        # Somebody is there; W&B's client has certificate settings of its own.
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    except (OSError, ValueError):
        return False
    return True
