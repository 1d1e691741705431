"""Who may see which tasks."""

from __future__ import annotations

import json

import pytest

from recast_peft import RecastConfigError
from recast_peft.integrations.serving.access import Tenant, Tenants

SECRET = "sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # printf secret | sha256sum


class TestTenants:
    def test_tenants_from_a_file(self, tmp_path):
        path = tmp_path / "tokens.json"
        path.write_text(json.dumps({"secret": {"name": "ada", "tasks": ["cats"]}}))
        tenant = Tenants.from_file(path).of("Bearer secret")
        assert tenant.sees("cats")
        assert not tenant.sees("dogs")
        assert not tenant.admin
        path.write_text(json.dumps({"secret": {"tasks": "cats"}}))
        with pytest.raises(RecastConfigError, match="list of texts"):
            Tenants.from_file(path)

    def test_a_token_may_be_kept_as_its_hash_alone(self):
        ada = Tenant("ada", frozenset({"cats"}), admin=True)
        tenants = Tenants({SECRET: ada})
        for header in ("Bearer secret", "bearer  secret "):
            assert tenants.of(header) is ada
        for header in (None, "", "Bearer", "Bearer ", "Basic secret", "secret", "Bearer Secret", f"Bearer {SECRET}"):
            assert tenants.of(header) is None
        assert "secret" not in repr(vars(Tenants({"secret": ada})))

    def test_without_any_token_nobody_could_ask(self):
        with pytest.raises(RecastConfigError, match="no token was given"):
            Tenants({})

    def test_a_tenant_of_all_tasks_is_no_administrator_for_that(self, tmp_path):
        path = tmp_path / "tokens.json"
        path.write_text(json.dumps({"one": {}, "two": {"admin": True, "tasks": []}}))
        tenants = Tenants.from_file(path)
        everything, admin = tenants.of("Bearer one"), tenants.of("Bearer two")
        assert (everything.name, everything.sees("any"), everything.admin) == ("tenant", True, False)
        assert (admin.sees("any"), admin.admin) == (False, True)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"secret": {"name": "ada", "task": ["cats"]}}, "'task'.*did you mean 'tasks'"),
            ({"secret": {"tasks": ["cats"], "Admin": True}}, "'Admin'.*did you mean 'admin'"),
            ({"ada": "secret"}, "entry 1 of .* holds no object"),
            ({"one": {}, "secret": None}, "entry 2 of .* holds no object"),
            ({"secret": {"name": 3}}, "'name' of entry 1 of .* is 3; expected a text"),
            ({"sha256:secret": {}}, "64 hexadecimal digits"),
            ({"sha256:2bb8": {}}, "64 hexadecimal digits"),
            ({f"sha256:{'g' * 64}": {}}, "64 hexadecimal digits"),
            ({"": {"admin": True}}, "cannot send"),
            ({"secret\n": {"tasks": []}}, "cannot send"),
            ({"gehe\u00efm": {"tasks": []}}, "cannot send"),
            ({SECRET: {"tasks": []}, "secret": {"admin": True}}, "given twice"),
            ({SECRET: {"tasks": []}, SECRET.upper().replace("SHA", "sha"): {}}, "given twice"),
        ],
    )
    def test_what_would_open_more_than_was_meant_is_refused(self, content, said, tmp_path):
        path = tmp_path / "tokens.json"
        path.write_text(json.dumps(content))
        with pytest.raises(RecastConfigError, match=said) as told:
            Tenants.from_file(path)
        assert "secret" not in str(told.value)  # logs are read by more people than tokens are for

    def test_a_token_that_stands_twice_is_not_shown(self, tmp_path):
        path = tmp_path / "tokens.json"
        path.write_text('{"one": {}, "secret": {}, "secret": {"admin": true}}')
        with pytest.raises(RecastConfigError, match="number 2 stands in it twice") as told:
            Tenants.from_file(path)
        assert "secret" not in str(told.value)

    def test_a_hash_in_capital_letters_is_one_too(self):
        for token in (SECRET.upper().replace("SHA", "sha"), SECRET.upper()):
            assert Tenants({token: Tenant("ada")}).of("Bearer secret") == Tenant("ada")
