-- Challenges by when they end, recorded answers by when they were given: what is over is found without the rest.
ALTER TABLE "challenge" ADD COLUMN "since" TEXT;
UPDATE "challenge" SET "since" = index_value('challenge', 'since', "row");
CREATE INDEX "challenge_since" ON "challenge" ("since", "id");

ALTER TABLE "request" ADD COLUMN "since" TEXT;
UPDATE "request" SET "since" = index_value('request', 'since', "row");
CREATE INDEX "request_since" ON "request" ("since", "id");
