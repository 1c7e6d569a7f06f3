import { unsafeClockText, type ClockState } from '@fleetkey/tpm2/clock.ts'

/** Milliseconds between two looks at the clock, at most. */
const longestPause = 30_000
/** Of what the TPM says it takes; then the server decides, as strict as ever. */
const patience = 1.25

/**
 * Waits until the TPM calls its clock safe, which it does by itself some time after a power cut: a quote before that is refused where no earlier one explains it.
 * `tell` hears why it is waited. Whether the clock is safe now: false when it took longer than the TPM said.
 */
export const safeClock = async (of: {
  readonly read: () => Promise<ClockState>
  readonly pause: (milliseconds: number) => Promise<void>
  readonly tell: (words: string) => void
}): Promise<boolean> => {
  let state = await of.read()
  let left = state.safeWithin * patience + 2_000
  while (!state.safe && left > 0) {
    of.tell(`${unsafeClockText(state)}; waiting`)
    const pause = Math.min(Math.max(state.safeWithin, 100), longestPause, left)
    await of.pause(pause)
    left -= pause
    state = await of.read()
  }
  return state.safe
}
