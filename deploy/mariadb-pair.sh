#!/bin/sh
# Makes two MariaDB servers replicate each other, and gives the service's account what it needs to see that. Both have an
# empty database and an account of the same names already. Again is harmless.
#
#   ROOT_PASSWORD_FILE=… REPLICA_PASSWORD_FILE=… mariadb-pair.sh HOST_A HOST_B ACCOUNT
set -eu

root_password=$(cat "$ROOT_PASSWORD_FILE")
replica_password=$(cat "$REPLICA_PASSWORD_FILE")

follow() { # SERVER SOURCE ACCOUNT
    MYSQL_PWD=$root_password mariadb --host="$1" --user=root <<SQL
-- Accounts are each server's own.
SET SESSION sql_log_bin = 0;
GRANT BINLOG MONITOR, REPLICA MONITOR ON *.* TO '$3'@'%';
CREATE USER IF NOT EXISTS 'replica'@'%';
ALTER USER 'replica'@'%' IDENTIFIED BY '$replica_password';
GRANT REPLICATION SLAVE ON *.* TO 'replica'@'%';
STOP SLAVE;
CHANGE MASTER TO MASTER_HOST = '$2', MASTER_USER = 'replica', MASTER_PASSWORD = '$replica_password',
  MASTER_USE_GTID = slave_pos, MASTER_CONNECT_RETRY = 1, MASTER_HEARTBEAT_PERIOD = 1;
START SLAVE;
SQL
}

follow "$1" "$2" "$3"
follow "$2" "$1" "$3"
