-- Devices whose recovery budget is spent: they wait for a person.
ALTER TABLE "device" ADD COLUMN "held" TEXT;
UPDATE "device" SET "held" = index_value('device', 'held', "row");
CREATE INDEX "device_held" ON "device" ("held", "id");
INSERT INTO "tally" SELECT 'device', 'held', "held", count(*) FROM "device" WHERE "held" IS NOT NULL GROUP BY "held";
