//! Scenario files: TOML, unknown keys are errors.

use std::time::Duration;

use seckill_domain::SaleId;
use serde::Deserialize;

use super::{Invalid, SaleOffer, Scenario};
use crate::arrivals::Stage;
use crate::buyers::prefix_of;
use crate::persona::{Kind, Pause, Persona};
use crate::threshold::Threshold;
use crate::timeline::{LinkSpec, Step};

/// A scenario as it is written down. What is absent keeps its default.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScenarioFile {
    /// What it is called.
    pub name: String,
    /// What it shows, in a sentence.
    pub about: String,
    /// The sale. `{run}` stands for four characters that differ from run to run.
    sale: Option<String>,
    rate: Option<f64>,
    duration: Option<Text<Duration>>,
    warmup: Option<Text<Duration>>,
    buyers: Option<u32>,
    quantity: Option<u32>,
    duplicates: Option<f64>,
    second_purchases: Option<f64>,
    connections: Option<u32>,
    warm_connections: Option<bool>,
    processes: Option<u32>,
    timeout: Option<Text<Duration>>,
    drain_timeout: Option<Text<Duration>>,
    forwarded_for: Option<bool>,
    shared_sale: Option<bool>,
    #[serde(default)]
    thresholds: Vec<Threshold>,
    #[serde(default)]
    offer: Vec<SaleOffer>,
    #[serde(default)]
    stage: Vec<StageText>,
    #[serde(default)]
    persona: Vec<PersonaText>,
    #[serde(default)]
    at: Vec<Step>,
    #[serde(default)]
    link: Vec<LinkSpec>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct StageText {
    #[serde(default)]
    burst: u64,
    rate: Option<f64>,
    from: Option<f64>,
    to: Option<f64>,
    duration: Text<Duration>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct PersonaText {
    kind: Kind,
    share: Option<f64>,
    sale: Option<String>,
    quantity: Option<u32>,
    looks: Option<u16>,
    think: Option<Text<Pause>>,
    duplicates: Option<f64>,
    second_purchases: Option<f64>,
    max_attempts: Option<u16>,
    honour_retry_after: Option<bool>,
    stubborn: Option<u16>,
    backoff: Option<Text<Duration>>,
    one_address: Option<bool>,
    follows: Option<bool>,
    pays: Option<f64>,
    cancels: Option<f64>,
    decides: Option<Text<Pause>>,
    coupon: Option<String>,
}

/// A value written as text.
#[derive(Debug, Clone, Copy)]
struct Text<T>(T);

impl<'de> Deserialize<'de> for Text<Duration> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        parse_duration(&text).map(Text).map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Text<Pause> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let (min, max) = text.split_once("..").unwrap_or((&text, &text));
        let ms = |text: &str| {
            let duration = parse_duration(text.trim()).map_err(serde::de::Error::custom)?;
            u32::try_from(duration.as_millis())
                .map_err(|_| serde::de::Error::custom("a pause is at most 49 days"))
        };
        Ok(Text(Pause { min_ms: ms(min)?, max_ms: ms(max)? }))
    }
}

impl ScenarioFile {
    /// Reads a file's text.
    pub fn parse(text: &str) -> Result<ScenarioFile, Invalid> {
        toml::from_str(text).map_err(|err| Invalid(err.to_string()))
    }

    /// Writes everything that the file says into `scenario`, whose seed is already decided.
    pub fn apply(self, scenario: &mut Scenario) -> Result<(), Invalid> {
        let run = prefix_of(scenario.seed);
        let filled = |text: &str| text.replace("{run}", &run);
        scenario.name = self.name;
        if let Some(sale) = &self.sale {
            scenario.sale = SaleId::new(&filled(sale)).map_err(|err| Invalid(format!("sale: {err}")))?;
        }
        let set =
            |into: &mut Duration, from: Option<Text<Duration>>| *into = from.map_or(*into, |text| text.0);
        set(&mut scenario.duration, self.duration);
        set(&mut scenario.warmup, self.warmup);
        set(&mut scenario.timeout, self.timeout);
        set(&mut scenario.drain_timeout, self.drain_timeout);
        scenario.rate = self.rate.unwrap_or(scenario.rate);
        scenario.quantity = self.quantity.unwrap_or(scenario.quantity);
        scenario.duplicates = self.duplicates.unwrap_or(scenario.duplicates);
        scenario.second_purchases = self.second_purchases.unwrap_or(scenario.second_purchases);
        scenario.connections = self.connections.unwrap_or(scenario.connections);
        scenario.warm_connections = self.warm_connections.unwrap_or(scenario.warm_connections);
        scenario.processes = self.processes.unwrap_or(scenario.processes);
        scenario.forwarded_for = self.forwarded_for.unwrap_or(scenario.forwarded_for);
        scenario.shared_sale = self.shared_sale.unwrap_or(scenario.shared_sale);
        scenario.thresholds = self.thresholds;
        scenario.timeline = self.at;
        scenario.links = self.link;
        scenario.offers = self.offer;
        for offer in &mut scenario.offers {
            offer.sale_id = filled(&offer.sale_id);
        }
        scenario.stages = self.stage.iter().map(StageText::read).collect::<Result<_, _>>()?;
        let main = scenario.sale.clone();
        scenario.personas =
            self.persona.into_iter().map(|persona| persona.read(main.as_str(), &filled)).collect();
        scenario.buyers = self.buyers.unwrap_or_else(|| scenario.buyers_by_default());
        Ok(())
    }
}

impl StageText {
    fn read(&self) -> Result<Stage, Invalid> {
        let (from, to) = match (self.rate, self.from, self.to) {
            (Some(rate), None, None) => (rate, rate),
            (None, Some(from), Some(to)) => (from, to),
            (None, None, None) if self.burst > 0 => (0.0, 0.0),
            _ => return Err(Invalid("a stage has a rate, or from and to, or only a burst".to_owned())),
        };
        Ok(Stage { burst: self.burst, from, to, duration: self.duration.0 })
    }
}

impl PersonaText {
    fn read(self, main: &str, filled: &dyn Fn(&str) -> String) -> Persona {
        let sale = self.sale.as_deref().map_or_else(|| main.to_owned(), filled);
        let base = Persona::of(self.kind, &sale);
        Persona {
            share: self.share.unwrap_or(base.share),
            quantity: self.quantity.unwrap_or(base.quantity),
            looks: self.looks.unwrap_or(base.looks),
            think: self.think.map_or(base.think, |text| text.0),
            duplicates: self.duplicates.unwrap_or(base.duplicates),
            second_purchases: self.second_purchases.unwrap_or(base.second_purchases),
            max_attempts: self.max_attempts.unwrap_or(base.max_attempts),
            honour_retry_after: self.honour_retry_after.unwrap_or(base.honour_retry_after),
            stubborn: self.stubborn.unwrap_or(base.stubborn),
            backoff_ms: self
                .backoff
                .map_or(base.backoff_ms, |text| u32::try_from(text.0.as_millis()).unwrap_or(u32::MAX)),
            one_address: self.one_address.unwrap_or(base.one_address),
            follows: self.follows.unwrap_or(base.follows),
            pays: self.pays.unwrap_or(base.pays),
            cancels: self.cancels.unwrap_or(base.cancels),
            decides: self.decides.map_or(base.decides, |text| text.0),
            coupon: self.coupon.as_deref().map(filled),
            ..base
        }
    }
}

/// `10s`, `1500ms`, `2m`, `1h`, or a number of seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match &text[digits.len()..] {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("a duration is a number with ms, s, m or h".to_owned()),
    };
    let number: f64 = digits.parse().map_err(|_| "a duration is a number with ms, s, m or h".to_owned())?;
    Duration::try_from_secs_f64(number * scale).map_err(|err| err.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_and_without_a_unit() {
        for (text, ms) in [("10", 10_000), ("10s", 10_000), ("1500ms", 1500), ("0.5s", 500), ("2m", 120_000)]
        {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for text in ["", "s", "-1s", "10 s", "10d", "nan"] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_file_says_everything_and_nothing_unknown() {
        let text = r#"
            name = "mixed"
            about = "some of each"
            sale = "mixed-{run}"
            thresholds = ["p99 < 50ms"]
            [[stage]]
            from = 0.0
            to = 100.0
            duration = "10s"
            [[persona]]
            kind = "human"
            share = 0.5
            think = "1s..3s"
            [[persona]]
            kind = "bot"
            sale = "other-{run}"
            share = 0.5
            [[at]]
            at = "2s"
            run = "master shift --to b --yes"
        "#;
        let mut scenario = Scenario { seed: 7, ..Scenario::default() };
        ScenarioFile::parse(text).unwrap().apply(&mut scenario).unwrap();
        assert_eq!(scenario.buyers, 500);
        assert_eq!(scenario.all_sales().len(), 2);
        assert!(!scenario.sale.as_str().contains("{run}"));
        assert_eq!(scenario.personas[0].think, Pause { min_ms: 1000, max_ms: 3000 });
        let err = ScenarioFile::parse(&text.replace("think", "thinks")).unwrap_err();
        assert!(err.to_string().contains("thinks"), "{err}");
        assert!(ScenarioFile::parse(&text.replace("p99 <", "p99 ~")).is_err());
    }
}
