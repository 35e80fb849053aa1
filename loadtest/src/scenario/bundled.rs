//! The scenarios that come with the program.

use super::{Invalid, ScenarioFile};

/// A scenario of `loadtest/scenarios/`.
#[derive(Debug, Clone, Copy)]
pub struct Bundled {
    /// Its name, as `run NAME` takes it.
    pub name: &'static str,
    /// The file's text.
    pub text: &'static str,
}

impl Bundled {
    /// Finds one by name.
    pub fn named(name: &str) -> Option<Bundled> {
        BUNDLED.into_iter().find(|bundled| bundled.name == name)
    }

    /// Reads it.
    pub fn parse(&self) -> Result<ScenarioFile, Invalid> {
        ScenarioFile::parse(self.text)
    }
}

macro_rules! bundled {
    ($($name:literal),+ $(,)?) => {
        /// All of them.
        pub const BUNDLED: [Bundled; [$($name),+].len()] = [
            $(Bundled { name: $name, text: include_str!(concat!("../../scenarios/", $name, ".toml")) }),+
        ];
    };
}

bundled!("herd", "steady", "ramp", "sold-out", "mixed", "coupons", "payments", "bots", "shift", "crash");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Scenario;

    #[test]
    fn every_bundled_scenario_can_be_run() {
        for bundled in BUNDLED {
            let file = bundled.parse().unwrap_or_else(|err| panic!("{}: {err}", bundled.name));
            assert_eq!(file.name, bundled.name);
            let mut scenario = Scenario {
                targets: vec!["http://127.0.0.1:1".to_owned()],
                secret: b"secret".to_vec(),
                payments: Some("token".to_owned()),
                data_dir: Some("/nowhere".into()),
                seed: 1,
                ..Scenario::default()
            };
            file.apply(&mut scenario).unwrap_or_else(|err| panic!("{}: {err}", bundled.name));
            scenario.validate().unwrap_or_else(|err| panic!("{}: {err}", bundled.name));
            for sale in scenario.all_sales() {
                assert!(
                    scenario.offers.iter().any(|offer| offer.sale_id == sale),
                    "{}: {sale}",
                    bundled.name
                );
            }
        }
    }

    #[test]
    fn no_scenario_file_is_left_out() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios");
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort();
        let mut known: Vec<_> = BUNDLED.iter().map(|bundled| bundled.name).collect();
        known.sort_unstable();
        assert_eq!(names, known);
    }
}
