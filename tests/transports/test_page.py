"""The page at ``/``: it needs nothing from elsewhere, and its policy lets in its own script and style only."""

from __future__ import annotations

import base64
import hashlib
import re

from hector_trio.transports.page import CONTENT_SECURITY_POLICY, PAGE

TEXT = PAGE.decode()


def test_the_page_loads_nothing_from_elsewhere() -> None:
    assert set(re.findall(r'\b(?:src|href)="([^"]*)"', TEXT)) == {"data:,"}
    assert "@import" not in TEXT
    assert "url(" not in TEXT


def test_the_policy_allows_the_one_script_and_the_one_style_by_their_hashes() -> None:
    for name in ("script", "style"):
        (inside,) = re.findall(f"<{name}>(.*?)</{name}>", TEXT, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in CONTENT_SECURITY_POLICY


def test_the_policy_has_nothing_to_forbid_in_the_page() -> None:
    assert not re.search(r"<[^>]*\s(?:style|on[a-z]+)=", TEXT.split("<script>")[0])


def test_every_control_has_a_label() -> None:
    for control in re.findall(r"<(?:textarea|input)\b[^>]*>", TEXT):
        if 'type="radio"' in control:
            assert f'<label class="choice">{control}' in TEXT
        else:
            (name,) = re.findall(r'\bid="([^"]+)"', control)
            assert f'for="{name}"' in TEXT
