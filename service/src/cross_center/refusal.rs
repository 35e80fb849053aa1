//! Why a request of another center is refused.

macro_rules! refusals {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $text:literal;)*) => {
        /// Why a request was refused. Nothing of it was executed. Answered with 401 and the stable code.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
        pub enum Refusal {
            $($(#[$doc])* #[error($text)] $variant,)*
        }

        impl Refusal {
            /// All of them.
            pub const ALL: &'static [Refusal] = &[$(Refusal::$variant,)*];

            /// The stable code.
            pub fn code(self) -> &'static str {
                match self { $(Refusal::$variant => $code,)* }
            }
        }
    };
}

refusals! {
    /// No `Signature` or no `Signature-Input`.
    SignatureMissing = "signature_missing", "the request is not signed";
    /// More than one signature.
    SignatureExtra = "signature_extra", "the request has more than one signature";
    /// The signature's fields are not in their canonical form, or have members that are not understood.
    SignatureMalformed = "signature_malformed", "the signature's fields are not valid";
    /// A component that must be covered is not.
    ComponentUncovered = "component_uncovered", "the signature does not cover every required component";
    /// Components beyond the required ones, or in another order.
    ComponentUnexpected = "component_unexpected", "the signature covers other components than the required ones";
    /// A covered field is not in the request, or twice, or not in its form.
    FieldInvalid = "field_invalid", "a covered field is missing or not valid";
    /// `created`, `expires`, `keyid` or `alg` is missing or not in its form.
    ParameterInvalid = "parameter_invalid", "a parameter of the signature is missing or not valid";
    /// Not HMAC-SHA256.
    AlgorithmWrong = "algorithm_wrong", "the signature's algorithm is not hmac-sha256";
    /// Created too long ago or in the future, or expired.
    Stale = "stale", "the signature is not of this time";
    /// No such long-term key, or one that is not of the center that used it.
    KeyUnknown = "key_unknown", "the key is not known";
    /// The signature does not fit.
    SignatureWrong = "signature_wrong", "the signature does not fit the request";
    /// The body is another one than was signed.
    DigestWrong = "digest_wrong", "the body does not fit its digest";
    /// Signed for another center.
    CenterWrong = "center_wrong", "the request is meant for another center";
    /// The session lives in another process, perhaps one that has ended.
    InstanceOther = "instance_other", "the session belongs to another instance";
    /// No such session.
    SessionUnknown = "session_unknown", "the session is not known";
    /// The session has ended.
    SessionExpired = "session_expired", "the session has expired";
    /// The sequence number, or the nonce, was seen before.
    Replayed = "replayed", "the request was seen before";
    /// There is no protocol version that both speak.
    VersionMismatch = "version_mismatch", "there is no protocol version that both centers speak";
    /// The request for a session cannot be understood.
    SessionMalformed = "session_malformed", "the request for a session is not valid";
}

impl Refusal {
    /// The refusal with a code.
    pub fn from_code(code: &str) -> Option<Refusal> {
        Refusal::ALL.iter().copied().find(|refusal| refusal.code() == code)
    }

    /// Whether a new session, and the request signed again, may help.
    pub fn wants_session(self) -> bool {
        matches!(self, Refusal::InstanceOther | Refusal::SessionUnknown | Refusal::SessionExpired)
    }
}
