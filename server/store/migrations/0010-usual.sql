-- What is usual is in no index: certificates that are valid, intents that became one. A certificate is found by its serial, not by a hash of all of it.
DROP INDEX "certificate_status";
DROP INDEX "certificate_fingerprint";
ALTER TABLE "certificate" ADD COLUMN "withdrawn" TEXT;
UPDATE "certificate" SET "withdrawn" = "status" WHERE "status" <> 'valid';
ALTER TABLE "certificate" DROP COLUMN "status";
ALTER TABLE "certificate" DROP COLUMN "fingerprint";
CREATE INDEX "certificate_withdrawn" ON "certificate" ("withdrawn", "id") WHERE "withdrawn" IS NOT NULL;

DROP INDEX "intent_state";
ALTER TABLE "intent" ADD COLUMN "unissued" TEXT;
UPDATE "intent" SET "unissued" = "state" WHERE "state" <> 'issued';
ALTER TABLE "intent" DROP COLUMN "state";
CREATE INDEX "intent_unissued" ON "intent" ("unissued", "id") WHERE "unissued" IS NOT NULL;
