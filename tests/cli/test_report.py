from __future__ import annotations

from lightning_privacy.cli import main
from lightning_privacy.reports import RunFacts, privacy_record, write_report
from tests.reports.test_tables import summary


def test_the_command_makes_the_page_again(tmp_path, capsys):
    page = write_report(privacy_record(summary(), RunFacts()), tmp_path / "run")
    page.unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.is_file()
    other = tmp_path / "public.html"
    assert main(["report", str(tmp_path), "--covered_only", "--output", str(other)]) == 0
    assert "It is left out of this page." in other.read_text()


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "PrivacyReport" in capsys.readouterr().err
