"""Who may see which tasks."""

from __future__ import annotations

import json

import pytest

from recast_peft import RecastConfigError


class TestTenants:
    def test_tenants_from_a_file(self, tmp_path):
        from recast_peft.integrations.serving.access import Tenants

        path = tmp_path / "tokens.json"
        path.write_text(json.dumps({"secret": {"name": "ada", "tasks": ["cats"]}}))
        tenant = Tenants.from_file(path).of("Bearer secret")
        assert tenant.sees("cats")
        assert not tenant.sees("dogs")
        assert not tenant.admin
        path.write_text(json.dumps({"secret": {"tasks": "cats"}}))
        with pytest.raises(RecastConfigError, match="list of texts"):
            Tenants.from_file(path)
