-- Rows: id, version, indexed fields as columns, the row itself as deterministic CBOR.

CREATE TABLE "device" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "state" TEXT,
  "batch" TEXT,
  "serial" TEXT
) STRICT;
CREATE INDEX "device_state" ON "device" ("state", "id");
CREATE INDEX "device_batch" ON "device" ("batch", "id");
CREATE UNIQUE INDEX "device_serial" ON "device" ("serial");

CREATE TABLE "manifest" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "device" TEXT,
  "serial" TEXT,
  "batch" TEXT
) STRICT;
CREATE UNIQUE INDEX "manifest_device" ON "manifest" ("device");
CREATE UNIQUE INDEX "manifest_serial" ON "manifest" ("serial");
CREATE INDEX "manifest_batch" ON "manifest" ("batch", "id");

CREATE TABLE "batch" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;

CREATE TABLE "station" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;

CREATE TABLE "group" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;

CREATE TABLE "member" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "group" TEXT,
  "device" TEXT
) STRICT;
CREATE INDEX "member_group" ON "member" ("group", "id");
CREATE INDEX "member_device" ON "member" ("device", "id");

CREATE TABLE "release" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "model" TEXT
) STRICT;
CREATE INDEX "release_model" ON "release" ("model", "id");

CREATE TABLE "endorsement" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;

CREATE TABLE "certificate" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "device" TEXT,
  "spkiHash" TEXT,
  "fingerprint" TEXT,
  "status" TEXT
) STRICT;
CREATE INDEX "certificate_device" ON "certificate" ("device", "id");
CREATE UNIQUE INDEX "certificate_spkiHash" ON "certificate" ("spkiHash");
CREATE UNIQUE INDEX "certificate_fingerprint" ON "certificate" ("fingerprint");
CREATE INDEX "certificate_status" ON "certificate" ("status", "id");

CREATE TABLE "intent" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "state" TEXT
) STRICT;
CREATE INDEX "intent_state" ON "intent" ("state", "id");

CREATE TABLE "challenge" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "client" TEXT
) STRICT;
CREATE INDEX "challenge_client" ON "challenge" ("client", "id");

CREATE TABLE "key" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;

CREATE TABLE "epoch" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "key" TEXT,
  "state" TEXT
) STRICT;
CREATE INDEX "epoch_key" ON "epoch" ("key", "id");
CREATE INDEX "epoch_state" ON "epoch" ("state", "id");

CREATE TABLE "grant" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "key" TEXT,
  "group" TEXT
) STRICT;
CREATE INDEX "grant_key" ON "grant" ("key", "id");
CREATE INDEX "grant_group" ON "grant" ("group", "id");

CREATE TABLE "holding" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "device" TEXT,
  "key" TEXT,
  "place" TEXT
) STRICT;
CREATE INDEX "holding_device" ON "holding" ("device", "id");
CREATE INDEX "holding_key" ON "holding" ("key", "id");
CREATE INDEX "holding_place" ON "holding" ("place", "id");

CREATE TABLE "dataKey" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;

CREATE TABLE "campaign" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "key" TEXT,
  "state" TEXT
) STRICT;
CREATE INDEX "campaign_key" ON "campaign" ("key", "id");
CREATE INDEX "campaign_state" ON "campaign" ("state", "id");

CREATE TABLE "target" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "campaign" TEXT,
  "device" TEXT,
  "place" TEXT
) STRICT;
CREATE INDEX "target_campaign" ON "target" ("campaign", "id");
CREATE INDEX "target_device" ON "target" ("device", "id");
CREATE INDEX "target_place" ON "target" ("place", "id");

CREATE TABLE "outbox" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "device" TEXT
) STRICT;
CREATE INDEX "outbox_device" ON "outbox" ("device", "id");

CREATE TABLE "request" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;

CREATE TABLE "token" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "hash" TEXT
) STRICT;
CREATE UNIQUE INDEX "token_hash" ON "token" ("hash");

CREATE TABLE "setting" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL
) STRICT;

-- The audit log: canonical bytes of each entry and the chain after it. Append only.
CREATE TABLE "audit_log" (
  "sequence" INTEGER PRIMARY KEY NOT NULL,
  "bytes" BLOB NOT NULL,
  "chain" BLOB NOT NULL
) STRICT;
CREATE TRIGGER "audit_log_no_update" BEFORE UPDATE ON "audit_log" BEGIN SELECT RAISE(ABORT, 'the audit log is append only'); END;
CREATE TRIGGER "audit_log_no_delete" BEFORE DELETE ON "audit_log" BEGIN SELECT RAISE(ABORT, 'the audit log is append only'); END;

CREATE TABLE "audit_head" (
  "id" INTEGER PRIMARY KEY NOT NULL CHECK ("id" = 1),
  "sequence" INTEGER NOT NULL,
  "chain" BLOB NOT NULL,
  "frontier" BLOB NOT NULL
) STRICT;
INSERT INTO "audit_head" VALUES (1, 0, zeroblob(32), zeroblob(0));

CREATE TABLE "write_probe" ("id" INTEGER PRIMARY KEY NOT NULL CHECK ("id" = 1), "at" INTEGER NOT NULL) STRICT;
INSERT INTO "write_probe" VALUES (1, 0);
