//! Instances in etcd: a key for each, bound to a lease that its instance keeps alive.

use std::time::Duration;

use etcd_client::{GetOptions, PutOptions, WatchOptions, WatchStream};
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use tokio_util::sync::CancellationToken;

use super::etcd_store::{EtcdStore, Failure};
use super::instances::{Instance, InstanceStore};
use super::store::StoreError;

/// An instance that is not heard of for this long is off the list, in seconds.
const LEASE_S: i64 = 10;
/// How often it is heard of: two signs of life may be lost.
const KEEP_ALIVE: Duration = Duration::from_secs(3);

impl EtcdStore {
    fn instances(&self) -> String {
        format!("{}/instances/", self.options().prefix)
    }

    async fn keep_registered(&self, instance: &Instance, until: &CancellationToken) -> Result<(), Failure> {
        let value = serde_json::to_vec(instance).map_err(|error| Failure::Refused(error.to_string()))?;
        let key = format!("{}{}/{}", self.instances(), instance.center, instance.id);
        let client = self.client().await?;
        let (mut leases, mut kv) = (client.lease_client(), client.kv_client());
        let lease = self.bounded(leases.grant(LEASE_S, None)).await?.id();
        self.bounded(kv.put(key, value, Some(PutOptions::new().with_lease(lease)))).await?;
        let (mut keeper, mut answers) = self.bounded(leases.keep_alive(lease)).await?;
        while until.run_until_cancelled(tokio::time::sleep(KEEP_ALIVE)).await.is_some() {
            self.bounded(keeper.keep_alive()).await?;
            let answer = self.bounded(answers.message()).await?;
            if answer.is_none_or(|answer| answer.ttl() <= 0) {
                return Err(Failure::Unanswered("the lease ran out".to_owned()));
            }
        }
        // Without this the key goes when the lease runs out.
        let _ = self.bounded(leases.revoke(lease)).await;
        Ok(())
    }

    async fn registered(&self) -> Result<Vec<Instance>, Failure> {
        let mut kv = self.client().await?.kv_client();
        let answer = self.bounded(kv.get(self.instances(), Some(GetOptions::new().with_prefix()))).await?;
        // One that cannot be read is of a release that writes something else entirely: not for this one to dial.
        Ok(answer.kvs().iter().filter_map(|record| serde_json::from_slice(record.value()).ok()).collect())
    }

    async fn watch_instances(&self) -> Result<WatchStream, Failure> {
        let mut client = self.client().await?.watch_client();
        self.bounded(client.watch(self.instances(), Some(WatchOptions::new().with_prefix()))).await
    }
}

impl InstanceStore for EtcdStore {
    fn keep<'a>(
        &'a self,
        instance: &'a Instance,
        until: CancellationToken,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        async move {
            let kept = Box::pin(self.keep_registered(instance, &until)).await;
            kept.map_err(|failure| self.unavailable("used to register this instance", failure))
        }
        .boxed()
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Instance>, StoreError>> {
        async move {
            self.registered().await.map_err(|failure| self.unavailable("asked for its instances", failure))
        }
        .boxed()
    }

    fn changes(&self) -> BoxStream<'static, Result<(), StoreError>> {
        let state = (self.clone(), None::<WatchStream>);
        futures_util::stream::try_unfold(state, async |(store, stream)| {
            let failed = |failure| store.unavailable("watched for instances", failure);
            let mut stream = match stream {
                Some(stream) => stream,
                None => store.watch_instances().await.map_err(failed)?,
            };
            // The first message says that the watch has begun: what changed before it is in a list read after it.
            match stream.message().await {
                Ok(Some(message)) if !message.canceled() => Ok(Some(((), (store, Some(stream))))),
                Ok(Some(message)) => Err(failed(Failure::Declined(message.cancel_reason().to_owned()))),
                Ok(None) => Ok(None),
                Err(error) => Err(failed(error.into())),
            }
        })
        .boxed()
    }
}
