//! The bytes of requests. Everything that is the same for all buyers is made once.

use seckill_domain::OrderId;

use crate::buyers::Buyers;
use crate::client::Target;
use crate::outcome::Asked;

/// Whose request it is.
#[derive(Debug, Clone, Copy)]
pub struct Sender {
    /// The buyer.
    pub user: u32,
    /// What to send as `X-Forwarded-For`, as an IPv4 address.
    pub forwarded_for: Option<u32>,
}

/// The requests that are sent to one target.
pub struct Requests {
    host: Vec<u8>,
    /// By item: what stands before the token, and after the key.
    purchases: Vec<(Vec<u8>, Vec<u8>)>,
    /// By item: the read of its sale, but for the end of its head.
    reads: Vec<Vec<u8>>,
    payments: String,
}

impl Requests {
    /// For these items at `target`.
    pub fn new(target: &Target, items: &[Asked], payments: Option<&str>) -> Requests {
        let host = target.authority();
        let purchase = |asked: &Asked| {
            let body = format!(r#"{{"quantity":{}}}"#, asked.quantity);
            let head = format!(
                "POST /v1/sales/{}/purchases HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n\
                 content-length: {}\r\nauthorization: Bearer ",
                asked.sale,
                body.len()
            );
            (head.into_bytes(), format!("\r\n\r\n{body}").into_bytes())
        };
        let read =
            |asked: &Asked| format!("GET /v1/sales/{} HTTP/1.1\r\nhost: {host}", asked.sale).into_bytes();
        Requests {
            host: host.as_bytes().to_owned(),
            purchases: items.iter().map(purchase).collect(),
            reads: items.iter().map(read).collect(),
            payments: payments.unwrap_or_default().to_owned(),
        }
    }

    /// Appends the purchase of an item under a buyer's `key`-th key. `forged`: with a forged token of this kind.
    pub fn purchase(
        &self,
        item: u8,
        buyers: &Buyers,
        sender: Sender,
        key: u32,
        forged: Option<u32>,
        out: &mut Vec<u8>,
    ) {
        let (head, tail) = &self.purchases[usize::from(item)];
        out.extend_from_slice(head);
        match forged {
            None => buyers.write_token(sender.user, out),
            Some(kind) => buyers.write_forged_token(sender.user, kind, out),
        }
        out.extend_from_slice(b"\r\nidempotency-key: ");
        buyers.write_key(sender.user, key, out);
        forwarded(sender, out);
        out.extend_from_slice(tail);
    }

    /// Appends the read of an item's sale.
    pub fn read_sale(&self, item: u8, sender: Sender, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.reads[usize::from(item)]);
        forwarded(sender, out);
        out.extend_from_slice(b"\r\n\r\n");
    }

    /// Appends the read of a buyer's order.
    pub fn read_order(&self, order: OrderId, buyers: &Buyers, sender: Sender, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("GET /v1/orders/{order}").as_bytes());
        self.head(out);
        buyers.write_token(sender.user, out);
        forwarded(sender, out);
        out.extend_from_slice(b"\r\n\r\n");
    }

    /// Appends the cancellation of a buyer's order.
    pub fn cancel(&self, order: OrderId, buyers: &Buyers, sender: Sender, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("POST /v1/orders/{order}/cancel").as_bytes());
        self.head(out);
        buyers.write_token(sender.user, out);
        forwarded(sender, out);
        out.extend_from_slice(b"\r\ncontent-length: 0\r\n\r\n");
    }

    /// Appends the payment of an order, as the shop's backend reports it.
    pub fn pay(&self, order: OrderId, amount: u64, coupon: Option<OrderId>, out: &mut Vec<u8>) {
        let coupon = coupon.map_or_else(String::new, |coupon| format!(r#","coupon_id":"{coupon}""#));
        let body = format!(r#"{{"payment_id":"pay-{order}","amount":{amount}{coupon}}}"#);
        out.extend_from_slice(format!("POST /v1/orders/{order}/pay").as_bytes());
        self.head(out);
        out.extend_from_slice(self.payments.as_bytes());
        out.extend_from_slice(
            format!("\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
                .as_bytes(),
        );
    }

    /// The rest of a request line and everything up to a token.
    fn head(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b" HTTP/1.1\r\nhost: ");
        out.extend_from_slice(&self.host);
        out.extend_from_slice(b"\r\nauthorization: Bearer ");
    }
}

fn forwarded(sender: Sender, out: &mut Vec<u8>) {
    if let Some(address) = sender.forwarded_for {
        let address = std::net::Ipv4Addr::from(address);
        out.extend_from_slice(format!("\r\nx-forwarded-for: {address}").as_bytes());
    }
}
