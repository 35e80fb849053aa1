//! The bytes of a purchase. Everything that is the same for all buyers is made once.

use crate::buyers::Buyers;
use crate::client::Target;
use crate::outcome::Asked;

/// The request of a purchase at one target.
pub struct PurchaseRequest {
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl PurchaseRequest {
    /// The request for what is asked at `target`.
    pub fn new(target: &Target, asked: &Asked) -> PurchaseRequest {
        let body = format!(r#"{{"quantity":{}}}"#, asked.quantity);
        let head = format!(
            "POST /v1/sales/{}/purchases HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nauthorization: Bearer ",
            asked.sale,
            target.authority(),
            body.len()
        );
        PurchaseRequest { head: head.into_bytes(), tail: format!("\r\n\r\n{body}").into_bytes() }
    }

    /// Appends the request of a buyer's `key`-th purchase.
    pub fn write(&self, buyers: &Buyers, user: u32, key: u16, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head);
        buyers.write_token(user, out);
        out.extend_from_slice(b"\r\nidempotency-key: ");
        buyers.write_key(user, key, out);
        out.extend_from_slice(&self.tail);
    }
}
