//! What signing and verifying a call between centers costs: `cargo run --release --example signing_cost`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use seckill::cross_center::MacKey;
use seckill::cross_center::calls::RESERVE;
use seckill::cross_center::signature::{Presented, Signing, sign};

/// Bytes that are signed for each size of a body.
const BYTES: usize = 20 << 20;

fn main() -> Result<()> {
    let key = MacKey::new(&[5; 32]);
    for kib in [1, 16, 64, 128] {
        let body = vec![b'x'; kib * 1024];
        let rounds = BYTES / body.len();
        let now_s = 1_800_000_000;
        let (mut signing, mut verifying) = (Duration::ZERO, Duration::ZERO);
        for round in 0..rounds {
            let request = http::Request::post(format!("http://a.example:8082{RESERVE}")).body(())?;
            let (mut parts, ()) = request.into_parts();
            let seq = u64::try_from(round).context("a number")?;
            let begin = Instant::now();
            sign(&mut parts, &body, &Signing { key_id: "9f3c.51aa", key: &key, epoch: 7, seq, now_s })?;
            signing += begin.elapsed();
            let begin = Instant::now();
            let refused = |refusal| anyhow!("refused: {refusal}");
            let presented = Presented::of(&parts, now_s).map_err(refused)?;
            presented.signed_with(&key).map_err(refused)?;
            presented.covers_body(&body).map_err(refused)?;
            verifying += begin.elapsed();
        }
        ensure!(rounds > 0, "nothing was signed");
        let each = |total: Duration| total.as_secs_f64() * 1e6 / rounds as f64;
        println!("{kib} KiB: sign {:.1} us, verify {:.1} us", each(signing), each(verifying));
    }
    Ok(())
}
