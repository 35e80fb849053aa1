//! Histograms as text: HdrHistogram's V2 format, compressed, in base64, as its other implementations write it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer as _, V2DeflateSerializer};
use serde::Deserialize as _;

/// A histogram in base64.
pub fn to_text(histogram: &Histogram<u64>) -> String {
    let mut bytes = Vec::new();
    match V2DeflateSerializer::new().serialize(histogram, &mut bytes) {
        Ok(_) => STANDARD.encode(bytes),
        Err(_) => {
            unreachable!("memory takes every write, and the histograms are far from the format's bounds")
        }
    }
}

/// Reads a histogram; `None` if the text is none.
pub fn from_text(text: &str) -> Option<Histogram<u64>> {
    let bytes = STANDARD.decode(text).ok()?;
    Deserializer::new().deserialize(&mut bytes.as_slice()).ok()
}

/// For `#[serde(with)]`.
pub fn serialize<S: serde::Serializer>(histogram: &Histogram<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&to_text(histogram))
}

/// For `#[serde(with)]`.
pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Histogram<u64>, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
    from_text(&text).ok_or_else(|| serde::de::Error::custom("not a histogram"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::histogram;

    #[test]
    fn a_histogram_survives_its_text() {
        let mut one = histogram(3);
        for value in [1, 50, 50_000, 3_600_000_000] {
            one.record_n(value, value % 7 + 1).unwrap();
        }
        assert_eq!(from_text(&to_text(&one)).unwrap(), one);
        assert!(from_text("AAAA").is_none());
    }
}
