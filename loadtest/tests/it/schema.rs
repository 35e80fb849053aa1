//! As much of JSON Schema as `schema.json` uses. A keyword it does not know is an error, so that nothing in
//! the schema goes unchecked.

use serde_json::Value;

/// What does not fit, each with its place.
pub(crate) fn errors(value: &Value) -> Vec<String> {
    let schema: Value = serde_json::from_str(include_str!("../../schema.json")).unwrap();
    let mut found = Vec::new();
    check(&schema, &schema, value, "$", &mut found);
    found
}

fn check(root: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    for (keyword, rule) in schema.as_object().unwrap() {
        match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "required" | "additionalProperties" => {}
            "$ref" => {
                let pointer = rule.as_str().unwrap().strip_prefix('#').unwrap();
                check(root, root.pointer(pointer).unwrap(), value, at, found);
            }
            "type" => {
                let types = rule.as_array().cloned().unwrap_or_else(|| vec![rule.clone()]);
                if !types.iter().any(|name| is(name.as_str().unwrap(), value)) {
                    found.push(format!("{at} is {value}, not {rule}"));
                }
            }
            "minimum" => {
                if value.as_f64().is_some_and(|value| value < rule.as_f64().unwrap()) {
                    found.push(format!("{at} is {value}, less than {rule}"));
                }
            }
            "const" => {
                if value != rule {
                    found.push(format!("{at} is {value}, not {rule}"));
                }
            }
            "enum" => {
                if !rule.as_array().unwrap().contains(value) {
                    found.push(format!("{at} is {value}, none of {rule}"));
                }
            }
            "anyOf" => {
                let fits = rule.as_array().unwrap().iter().any(|one| {
                    let mut inner = Vec::new();
                    check(root, one, value, at, &mut inner);
                    inner.is_empty()
                });
                if !fits {
                    found.push(format!("{at} fits nothing of {rule}: {value}"));
                }
            }
            "items" => {
                for (i, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(root, rule, item, &format!("{at}[{i}]"), found);
                }
            }
            "properties" => {
                for (name, member) in value.as_object().into_iter().flatten() {
                    let at = format!("{at}.{name}");
                    match rule.get(name) {
                        Some(rule) => check(root, rule, member, &at, found),
                        None if schema["additionalProperties"] == false => {
                            found.push(format!("{at} is not known"));
                        }
                        None => {}
                    }
                }
                for name in schema["required"].as_array().into_iter().flatten() {
                    if value.is_object() && value.get(name.as_str().unwrap()).is_none() {
                        found.push(format!("{at} has no {name}"));
                    }
                }
            }
            other => panic!("schema.json uses {other}, which is not checked"),
        }
    }
}

fn is(name: &str, value: &Value) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("no type {other}"),
    }
}
