"""`python -m deploy.costs`: refit all shipped cost profiles from the tables and write them."""

from deploy.costs.page import page
from deploy.costs.sources import all_profiles
from shared.profiles import PROFILES
from sim.calibrated_profile import profile_json


def main() -> None:
    """Write deploy/costs/*.json and README.md."""
    profiles = list(all_profiles())
    names = {f"{profile.name}.json" for profile in profiles}
    for old in PROFILES.glob("*.json"):
        if old.name not in names:
            old.unlink()
    for profile in profiles:
        (PROFILES / f"{profile.name}.json").write_bytes(profile_json(profile))
    (PROFILES / "README.md").write_text(page(profiles), encoding="utf-8")
    print(f"{len(profiles)} profiles in {PROFILES}")  # noqa: T201


if __name__ == "__main__":
    main()
