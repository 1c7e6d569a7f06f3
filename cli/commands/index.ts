import type { Command } from '../command.ts'
import { alertCommands } from './alert.ts'
import { attestCommands } from './attest.ts'
import { auditCommands } from './audit.ts'
import { caCommands } from './ca.ts'
import { campaignCommands } from './campaign.ts'
import { deviceCommands } from './device.ts'
import { doctorCommands } from './doctor.ts'
import { endorsementCommands } from './endorsement.ts'
import { factoryCommands } from './factory.ts'
import { groupCommands } from './group.ts'
import { inventoryCommands } from './inventory.ts'
import { inspectCommands } from './inspect.ts'
import { keyCommands } from './key.ts'
import { kmsCommands } from './kms.ts'
import { ledgerCommands } from './ledger.ts'
import { operatorCommands } from './operator.ts'
import { policyCommands } from './policy.ts'
import { releaseCommands } from './release.ts'
import { outOfServiceCommands } from './out-of-service.ts'
import { rolloverCommands } from './rollover.ts'
import { sealCommands } from './seal.ts'
import { serverCommands } from './server.ts'
import { tokenCommands } from './token.ts'

/** One more command is one more row in one of these files. */
export const commands: readonly Command[] = [
  ...serverCommands,
  ...kmsCommands,
  ...sealCommands,
  ...factoryCommands,
  ...outOfServiceCommands,
  ...releaseCommands,
  ...endorsementCommands,
  ...tokenCommands,
  ...rolloverCommands,
  ...operatorCommands,
  ...groupCommands,
  ...policyCommands,
  ...deviceCommands,
  ...keyCommands,
  ...ledgerCommands,
  ...campaignCommands,
  ...caCommands,
  ...inventoryCommands,
  ...alertCommands,
  ...auditCommands,
  ...attestCommands,
  ...inspectCommands,
  ...doctorCommands,
]
