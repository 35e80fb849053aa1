//! The topology document.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use seckill_domain::{CenterId, CenterNumber, Epoch, SHARDS, Shard};
use seckill_ledger::{Fence, LedgerId};
use serde::{Deserialize, Deserializer, Serialize};

use super::shift::Shift;

/// Version of the document's format.
pub const SCHEMA: u32 = 1;

/// Fields that this release does not know. They survive a change made by it.
pub type Extra = serde_json::Map<String, serde_json::Value>;

/// The topology: which center is the master, at which epoch, and who is at home where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    /// Version of the format, [`SCHEMA`].
    pub schema: u32,
    /// The ledger that this topology belongs to.
    pub ledger_id: LedgerId,
    /// Number of the authority: grows with every shift, and whenever a ledger's past is in doubt.
    pub epoch: Epoch,
    /// The center whose Redis takes competitive writes.
    pub master: CenterId,
    /// Replicas that may be promoted without loss.
    #[serde(default)]
    pub in_sync: Vec<InSync>,
    /// Whether the master shifts or a replica is missing.
    pub state: TopologyState,
    /// What an acknowledged purchase survives, while the state is not `degraded`.
    #[serde(default)]
    pub durability: Durability,
    /// The shift that is under way.
    #[serde(default)]
    pub shift: Option<Box<Shift>>,
    /// The latest shifts that are over, the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Shift>,
    /// All centers.
    pub centers: BTreeMap<CenterId, Center>,
    /// The home center of each of the 64 shards, by shard number.
    pub shard_owners: Vec<CenterId>,
    /// Number of the latest attempt to move shards: recorded before any database hears of it, and never used again
    /// (O1). It is a number of its own, because the ledger takes no part in it and sales go on.
    #[serde(default)]
    pub shard_epoch: i64,
    /// Shards whose orders are not written at the moment.
    #[serde(default)]
    pub blocked_shards: Vec<Shard>,
    /// Rate limits.
    #[serde(default)]
    pub limits: Limits,
    /// The server run that was last made master for each inventory partition, and at which epoch. Empty until
    /// the ledger is created.
    #[serde(default)]
    pub ledger_runs: BTreeMap<u8, LedgerRun>,
    /// Partitions whose ledger is being adopted: what was begun is finished before anything is sold.
    #[serde(default)]
    pub adopting: BTreeSet<u8>,
    /// Partitions whose master lost data, and copies them from another center's server before it is opened.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub restoring: BTreeMap<u8, Restore>,
    /// How far the outbox of each partition's master was, while purchases are acknowledged without the other center:
    /// what may be missing there when the master is gone (H6).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub positions: BTreeMap<u8, Position>,
    /// Since when no replica is in sync that should be, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded_since: Option<String>,
    /// Fields of later releases.
    #[serde(flatten)]
    pub extra: Extra,
}

impl Topology {
    /// The topology of a single center whose ledger is still to be created.
    pub fn single(ledger_id: LedgerId, id: CenterId, center: Center, limits: Limits) -> Topology {
        Topology {
            schema: SCHEMA,
            ledger_id,
            epoch: Epoch(0),
            master: id.clone(),
            in_sync: Vec::new(),
            state: TopologyState::Steady,
            durability: Durability::Local,
            shift: None,
            history: Vec::new(),
            shard_owners: vec![id.clone(); usize::from(SHARDS)],
            centers: BTreeMap::from([(id, center)]),
            shard_epoch: 0,
            blocked_shards: Vec::new(),
            limits,
            ledger_runs: BTreeMap::new(),
            adopting: BTreeSet::new(),
            restoring: BTreeMap::new(),
            positions: BTreeMap::new(),
            degraded_since: None,
            extra: Extra::new(),
        }
    }

    /// What a write to the ledger has to carry under this topology.
    pub fn fence(&self) -> Fence {
        Fence { ledger_id: self.ledger_id.clone(), epoch: self.epoch, master: self.master.clone() }
    }

    /// The center that the users of a shard are at home in.
    pub fn home_center(&self, shard: Shard) -> &CenterId {
        // `check` has seen to it that all 64 are there.
        self.shard_owners.get(usize::from(shard.number())).unwrap_or(&self.master)
    }

    /// The shards whose users are at home in a center.
    pub fn shards_of(&self, center: &CenterId) -> impl Iterator<Item = Shard> {
        Shard::all().filter(move |shard| self.home_center(*shard) == center)
    }

    /// A center by its id.
    pub fn center(&self, id: &CenterId) -> Option<&Center> {
        self.centers.get(id)
    }

    /// What an acknowledgement has to wait for. A master without a replica that is in sync sells on with
    /// [`Durability::Local`].
    pub fn effective_durability(&self) -> Durability {
        match self.durability {
            Durability::Replicated if !self.in_sync.is_empty() && self.state != TopologyState::Degraded => {
                Durability::Replicated
            }
            Durability::Replicated | Durability::Local => Durability::Local,
        }
    }

    /// Whether the ledger of a partition was ever created under this topology.
    pub fn ledger_exists(&self, partition: u8) -> bool {
        self.ledger_runs.contains_key(&partition)
    }

    /// What is wrong with the document, if anything: whoever reads one relies on these.
    pub fn check(&self) -> Result<(), String> {
        if self.schema != SCHEMA {
            return Err(format!(
                "the topology has schema {}, this release reads schema {SCHEMA}",
                self.schema
            ));
        }
        if !self.centers.contains_key(&self.master) {
            return Err(format!("the master {} is none of the centers", self.master));
        }
        if self.shard_owners.len() != usize::from(SHARDS) {
            return Err(format!("{} shard owners instead of {SHARDS}", self.shard_owners.len()));
        }
        if let Some(owner) = self.shard_owners.iter().find(|owner| !self.centers.contains_key(*owner)) {
            return Err(format!("the shard owner {owner} is none of the centers"));
        }
        let mut numbers: Vec<u8> = self.centers.values().map(|center| center.number.get()).collect();
        numbers.sort_unstable();
        if numbers.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("two centers have the same number".to_owned());
        }
        Ok(())
    }
}

/// One data center.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Center {
    /// Its number, 1–8: the first digit of the order ids of its users.
    pub number: CenterNumber,
    /// Base URL of its public listener.
    pub public_url: String,
    /// Base URL of its admin listener.
    pub admin_url: String,
    /// Base URL of its internal listener.
    pub internal_url: String,
    /// `HOST:PORT` of each inventory partition's Redis, as the other centers reach it: replicas copy from there,
    /// and guardians look at it before they give a server its role. Empty where there is only one center.
    #[serde(default)]
    pub ledger: Vec<String>,
    /// Fields of later releases.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A replica that has everything that was acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InSync {
    /// Its center.
    pub center: CenterId,
    /// The run of its server (S4).
    pub run_id: String,
    /// Fields of later releases.
    #[serde(flatten)]
    pub extra: Extra,
}

/// From where a master copies what it lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The center whose server has it.
    pub from: CenterId,
    /// The fence that this server shows. It keeps it while it is copied from.
    pub fence: String,
    /// Fields of later releases.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A promotion that happened: this run of the server had the fence of this epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerRun {
    /// The server's `run_id`.
    pub run_id: String,
    /// The epoch that its fence was set to. A ledger that shows an earlier one has been rolled back.
    pub epoch: Epoch,
    /// Fields of later releases.
    #[serde(flatten)]
    pub extra: Extra,
}

/// How far a master's outbox was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The epoch of its fence.
    pub epoch: Epoch,
    /// The sequence of its last entry.
    pub seq: u64,
    /// When, RFC 3339.
    pub at: String,
    /// Fields of later releases.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What an acknowledged purchase survives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// Kill -9 and power loss of the master: its append-only file has it.
    #[default]
    Local,
    /// The loss of the master center, too: the other center's replica has confirmed it.
    Replicated,
}

impl Durability {
    /// The name in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Durability::Local => "local",
            Durability::Replicated => "replicated",
        }
    }
}

/// Whether all is as it should be between the centers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TopologyState {
    /// Nothing is going on.
    Steady,
    /// The master shifts.
    Shifting,
    /// A replica was taken off.
    Degraded,
}

impl TopologyState {
    /// The state's name in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            TopologyState::Steady => "steady",
            TopologyState::Shifting => "shifting",
            TopologyState::Degraded => "degraded",
        }
    }
}

/// Rate limits of each service instance. `null` or `"off"` means no limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Purchases and reads of one user. Default: 10/s with a burst of 20.
    #[serde(default = "Limits::default_per_user", deserialize_with = "rate_or_off")]
    pub per_user: Option<Rate>,
    /// Requests from one client address. Default: off, because behind a proxy or NAT one address is many people.
    #[serde(default, deserialize_with = "rate_or_off")]
    pub per_address: Option<Rate>,
    /// Purchases of one sale. Default: off.
    #[serde(default, deserialize_with = "rate_or_off")]
    pub per_sale: Option<Rate>,
    /// Requests to one instance. Default: off.
    #[serde(default, deserialize_with = "rate_or_off")]
    pub per_instance: Option<Rate>,
    /// Fields of later releases. Whoever takes limits from a person refuses them instead.
    #[serde(flatten)]
    pub extra: Extra,
}

impl Limits {
    fn default_per_user() -> Option<Rate> {
        Rate::new(10, 20)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            per_user: Limits::default_per_user(),
            per_address: None,
            per_sale: None,
            per_instance: None,
            extra: Extra::new(),
        }
    }
}

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Tokens that come back each second.
    pub per_second: NonZeroU32,
    /// Tokens that a full bucket holds.
    pub burst: NonZeroU32,
}

impl Rate {
    /// A rate, if both numbers are above 0.
    pub fn new(per_second: u32, burst: u32) -> Option<Rate> {
        Some(Rate { per_second: NonZeroU32::new(per_second)?, burst: NonZeroU32::new(burst)? })
    }
}

fn rate_or_off<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Rate>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum RateOrOff {
        Off(Off),
        Rate(Rate),
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Off {
        Off,
    }
    Ok(match Option::<RateOrOff>::deserialize(deserializer)? {
        None | Some(RateOrOff::Off(Off::Off)) => None,
        Some(RateOrOff::Rate(rate)) => Some(rate),
    })
}

/// A new ledger's name: 128 random bits.
pub fn new_ledger_id() -> LedgerId {
    let random: u128 = rand::random();
    LedgerId::new(&format!("{random:032x}")).expect("hexadecimal digits are a ledger id")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Topology {
        let center = Center {
            number: CenterNumber::new(1).unwrap(),
            public_url: "http://127.0.0.1:8080".to_owned(),
            admin_url: "http://127.0.0.1:8081".to_owned(),
            internal_url: "http://127.0.0.1:8082".to_owned(),
            ledger: Vec::new(),
            extra: Extra::new(),
        };
        Topology::single(new_ledger_id(), CenterId::new("a").unwrap(), center, Limits::default())
    }

    #[test]
    fn fields_of_a_later_release_survive() {
        let mut json = serde_json::to_value(document()).unwrap();
        json["witness"] = "c".into();
        json["centers"]["a"]["instances"] = serde_json::json!([{ "id": 1 }]);
        json["limits"]["per_planet"] = 7.into();
        let read: Topology = serde_json::from_value(json.clone()).unwrap();
        read.check().unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), json);
    }

    #[test]
    fn limits_can_be_switched_off() {
        let limits: Limits = serde_json::from_str(r#"{"per_user":null,"per_sale":"off"}"#).unwrap();
        assert_eq!((limits.per_user, limits.per_sale), (None, None));
        let limits: Limits = serde_json::from_str("{}").unwrap();
        assert_eq!(limits, Limits::default());
        assert!(serde_json::from_str::<Limits>(r#"{"per_user":{"per_second":0,"burst":1}}"#).is_err());
    }

    #[test]
    fn an_impossible_document_is_refused() {
        let mut nobody = document();
        nobody.master = CenterId::new("z").unwrap();
        let mut short = document();
        short.shard_owners.pop();
        let mut later = document();
        later.schema = 2;
        for bad in [nobody, short, later] {
            assert!(bad.check().is_err());
        }
    }
}
