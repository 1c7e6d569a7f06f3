import { property } from './capabilities.ts'
import { duration } from './lockout.ts'
import type { Tpm } from './tpm.ts'

/** What a TPM says of its clock, unsigned. */
export interface ClockState {
  readonly resetCount: number
  readonly restartCount: number
  /** Whether it surely never went back: not after a loss of power without TPM2_Shutdown, until it has passed what may have been lost (Part 1 §36.3). */
  readonly safe: boolean
  /** Milliseconds, at most, until it is safe; 0 when it is. */
  readonly safeWithin: number
}

/** Longest interval at which a TPM saves its clock (Part 1 §36.3.2): 2^22 ms, 70 minutes. */
const longestInterval = 2 ** 22

/** TPM2_ReadClock; of a clock that is not safe also when it will be: with the next save, at a multiple of the interval that the TPM states (TPM_PT_CLOCK_UPDATE). */
export const readClockState = async (tpm: Tpm): Promise<ClockState> => {
  const { resetCount, restartCount, safe, clock } = await tpm.readClock()
  if (safe) return { resetCount, restartCount, safe, safeWithin: 0 }
  const stated = (await tpm.property(property.clockUpdate)) ?? longestInterval
  const interval = stated > 0 && stated <= longestInterval ? stated : longestInterval
  return { resetCount, restartCount, safe, safeWithin: interval - Number(clock % BigInt(interval)) }
}

/** For a person: why it is waited, and for how long. */
export const unsafeClockText = ({ safeWithin }: Pick<ClockState, 'safeWithin'>): string =>
  `the TPM calls its clock unsafe after a power cut; it becomes safe within ${duration(Math.ceil(safeWithin / 1000))}`
